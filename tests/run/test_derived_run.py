"""`run`, `plan` and `compress` on a type that nobody declared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from folders import invoke, save_tokens
from transformers import AutoModelForCausalLM

from invariance import compress
from invariance.model.tiny import tiny

RECIPE = """\
model: ./gpt_neox
calibrate: {data: tokens.npy}
steps:
  - {spaces: mlp, rotate: permute, select: {uniform: {keep: 0.75, multiple_of: 2}}, slice: least_squares}
evaluate: [{perplexity: {data: tokens.npy}}]
"""


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("derived_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.chdir(root)
        tiny("gpt_neox").model.float().save_pretrained("gpt_neox")
        save_tokens(root / "tokens.npy")
        (root / "recipe.yaml").write_text(RECIPE)
        yield root


def test_a_run_writes_a_stock_checkpoint_and_says_what_a_plan_said(root: Path) -> None:
    status, out, err = invoke("plan", "recipe.yaml", "--json")
    assert status == 0, err
    plan = json.loads(out)
    assert plan["needs"]["whole"] == "a derived layout" and plan["flops_per_token"]["dense"] is None
    assert invoke("plan", "recipe.yaml")[0] == 0
    status, out, err = invoke("run", "recipe.yaml", "--output", "made", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["parameters"]["sliced"] == plan["parameters"]["sliced"]
    assert report["model"]["stock"] and report["model"]["exported_as"] == "gpt_neox"
    assert report["exactness"]["passed"] and report["exactness"]["cut_error"] <= 1e-10
    assert report["widths"]["mlp.0"] == 30 and report["dims"]["mlp.0"] == 40
    (found,) = report["perplexity"].values()
    assert found["sliced"] > 0 and found["dense"] != found["sliced"]
    assert (root / "made" / "report.html").is_file()
    small = AutoModelForCausalLM.from_pretrained("made/model")
    assert sum(p.numel() for p in small.parameters()) == report["parameters"]["sliced"]["total"]
    assert small.config.intermediate_size == 30
    small.generate(torch.randint(3, 41, (1, 5)), max_new_tokens=3, do_sample=False)


def test_compress_gives_the_same_model(root: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained("gpt_neox")
    small = compress(model, root / "recipe.yaml")
    assert small.config.intermediate_size == 30 and model.config.intermediate_size == 40
    ids = torch.randint(3, 41, (1, 9))
    assert small(ids).logits.shape == model(ids).logits.shape


def test_what_cannot_be_is_refused_with_the_line_and_nothing_is_written(root: Path) -> None:
    (root / "bad.yaml").write_text(RECIPE.replace("spaces: mlp", "spaces: qk"))
    status, _, err = invoke("run", "bad.yaml", "--output", "bad")
    assert status == 2 and "bad.yaml:4" in err and "Traceback" not in err
    assert not (root / "bad").exists()
