"""What the survey says can be cut was cut: zeros elsewhere differ, and a cut that is none is told from one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from derive_models import tokens
from described import described, description_of, small
from transformers import AutoConfig

from invariance.core.errors import InputError
from invariance.io.configs import check_config
from invariance.model.cuttable import of_kind
from invariance.model.derive.certify import CONTROL, TOLERANCE
from invariance.model.described.weightless import on_meta
from invariance.model.narrow.kinds import channels, heads, samples

PROBE = tokens(3, 11, seed=7)


@pytest.mark.parametrize(
    ("kind", "which", "plain"),
    [
        ("llama", "mlp", True),
        ("llama", "stream", True),
        ("llama", "heads", True),
        ("gpt2", "stream", False),
        ("gpt2", "heads", False),
        ("bloom", "mlp", False),
        ("mixtral", "experts", True),
    ],
)
def test_a_kind_that_holds_is_exact_and_zeros_elsewhere_are_not(
    kind: str, which: str, plain: bool
) -> None:
    model, description = described(kind)
    kinds = samples(description.flat(), on_meta(model.config))
    found = of_kind(model, description, which, kinds[which], PROBE)
    assert found.holds and found.plain == plain, found.reason
    assert found.error <= TOLERANCE and found.control > 1000 * CONTROL


def test_a_cut_of_other_coordinates_does_not_hold() -> None:
    model, description = described("llama")
    some = samples(description.flat(), on_meta(model.config))["mlp"]
    same = of_kind(model, description, "mlp", lambda last: some(False), PROBE)
    assert not same.holds and "zeros elsewhere" in same.reason


def test_values_of_llama_have_no_width_of_their_own() -> None:
    model, description = described("llama")
    some = samples(description.flat(), on_meta(model.config))["vo"]
    found = of_kind(model, description, "vo", some, PROBE)
    assert not found.holds and "do not run" in found.reason


def test_a_norm_that_forgets_its_old_width_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, description = described("llama")
    some = samples(description.flat(), on_meta(model.config))["stream"]
    monkeypatch.setattr("invariance.model.narrow.cut.renorm", lambda *_: False)
    found = of_kind(model, description, "stream", some, PROBE)
    assert not found.holds and "cut and zeroed differ" in found.reason


def test_heads_go_with_the_keys_and_values_that_they_share() -> None:
    flat = described("llama")[1].flat()
    assert heads(flat)["heads@0"] == [[0, 1, 4], [2, 3, 5]]  # four of queries, two of the others
    assert heads(described("gpt2")[1].flat())["heads@0"] == [[0], [1], [2], [3]]


def test_values_that_are_clipped_are_no_channels_of_an_mlp() -> None:
    model = small(
        "mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=64, attn_config={"clip_qkv": 0.5}
    )
    flat = description_of(model).flat()
    assert any(s.kind.value == "PERM" and s.copies == 4 for s in flat.spaces.values())
    assert set(channels(flat).values()) == {"ffn.down_proj"}


def test_a_range_without_an_end_is_no_damage_where_the_family_has_it() -> None:
    values = AutoConfig.for_model("mamba2").to_dict()
    assert np.inf in values["time_step_limit"]
    check_config("here", values)
    values["layer_norm_epsilon"] = np.inf
    with pytest.raises(InputError, match="layer_norm_epsilon: inf"):
        check_config("here", values)


def test_building_a_model_leaves_its_config_alone() -> None:
    config: Any = AutoConfig.for_model("gpt2")
    config._attn_implementation = "sdpa"
    on_meta(config)
    assert config._attn_implementation == "sdpa"
