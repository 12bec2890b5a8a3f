"""`inspect` and `verify` of types that nobody declared: derived, certified, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from folders import invoke
from transformers import AutoConfig, AutoModelForCausalLM

from invariance.io import layouts
from invariance.model.described import text
from invariance.model.described.accept import without
from invariance.model.tiny import tiny


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("derived")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.chdir(root)
        yield root


def saved(kind: str) -> Path:
    folder = Path(kind)
    if not folder.exists():
        tiny(kind).model.float().save_pretrained(folder)
    return folder


def test_the_layout_is_printed_as_its_text_and_derived_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status, out, err = invoke("inspect", saved("gpt_neox"), "--layout")
    assert status == 0, err
    found = text.read(out)
    assert {s.name for p in found.parts for s in p.spaces} >= {"residual", "ch@", "qk@", "vo@"}
    monkeypatch.setattr(layouts, "layout_text", None)  # would be called if it were derived again
    assert invoke("inspect", saved("gpt_neox"), "--layout")[1] == out
    status, table, _ = invoke("inspect", saved("gpt_neox"))
    assert status == 0 and "derived" in table and "residual" in table
    document = json.loads(invoke("inspect", saved("gpt_neox"), "--json")[1])
    assert document["spaces"]["ch@1"]["group"] == "PERM"
    assert text.read(document["layout"]) == found


def test_declared_types_have_a_layout_too() -> None:
    status, out, err = invoke("inspect", saved("llama"), "--layout")
    assert status == 0, err
    assert "space residual     O " in out
    assert "derived" not in invoke("inspect", saved("llama"))[1]


@pytest.mark.parametrize("kind", ["olmo2", "mixtral", "mamba"])
def test_types_that_nobody_declared_are_certified_on_their_own_weights(kind: str) -> None:
    status, out, err = invoke("verify", saved(kind), "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["passed"] and found["relative_error"] <= 1e-10
    assert found["negative_control"] > 1e-7 and found["longest"] >= 700
    assert len(found["controls"]) == found["spaces"] > 4 and found["refuted"] == {}


def test_a_layout_that_does_not_hold_is_dropped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layouts.derived_layout(AutoConfig.from_pretrained(saved("gpt_neox")))
    wrong = text.read(text.write(right).replace("space residual     O1", "space residual     O "))
    monkeypatch.setattr(layouts, "derived_layout", lambda config: wrong)
    status, out, _ = invoke("verify", saved("gpt_neox"))
    assert status == 0 and "Dropped: residual moves the logits by" in " ".join(out.split())
    nothing = without(right, {(0, "residual"), *((1, s.name) for s in right.layers[0].spaces)})
    monkeypatch.setattr(layouts, "derived_layout", lambda config: nothing)
    status, _, err = invoke("verify", saved("gpt_neox"))
    assert status == 1 and "a fault might go unseen" in " ".join(err.split())


def test_what_cannot_be_derived_is_refused_with_the_reason() -> None:
    config = AutoConfig.for_model("vit")
    with pytest.raises(Exception, match=r"'vit': no layout can be derived.*Unrecognized config"):
        layouts.derived_layout(config)
    config.save_pretrained("vit")
    for command in ("inspect", "verify"):
        status, _, err = invoke(command, "./vit")
        assert status == 2 and "'vit'" in err and "Traceback" not in err


def test_what_does_not_fit_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from invariance.calibrate import derived

    monkeypatch.setattr(derived, "COPIES", 10**12)
    status, _, err = invoke("verify", saved("gpt_neox"))
    assert status == 2 and "whole model in float64" in " ".join(err.split())


def test_a_head_that_is_tied_stays_so_in_the_model_that_was_given() -> None:
    from invariance.calibrate.derived import certify_derived

    config = AutoConfig.from_pretrained(saved("gpt_neox"))
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 60, (2, 16))
    assert certify_derived(model, layouts.derived_layout(config), ids).certificate.passed
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.dtype == torch.float32
