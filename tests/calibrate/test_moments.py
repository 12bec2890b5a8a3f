"""Moments and their store: sums that parts add up to, and files that are used again where they hold and only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import VOCABULARY, model_of
from hypothesis import given
from hypothesis import strategies as st
from sliced import HEADS, MEAN, MLP, RAW, RESIDUAL, close, dense, recipe, same, sliced
from sliced import data as data
from transformers import PreTrainedModel

from invariance.calibrate import walk
from invariance.calibrate.moments import Moment, Moments, Store
from invariance.calibrate.statistic import Statistic
from invariance.compress.means import Means
from invariance.compress.pipeline import slice_model
from invariance.compress.planner import plan
from invariance.core.group import Group
from invariance.core.space import Space
from invariance.io.data import Amount, load_tokens
from invariance.io.models import weights_digest
from invariance.recipe.recipe import Recipe

# --- Moments.


@given(
    seed=st.integers(0, 999),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    heads=st.sampled_from([(1, 1), (2, 4)]),
    statistic=st.sampled_from([RAW, MEAN]),
)
def test_taking_tokens_in_by_parts_is_taking_them_in_at_once(
    seed: int, cuts: list[int], heads: tuple[int, int], statistic: Statistic
) -> None:
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole, parts, merged = Moments(), Moments(), Moments()
    key = ("vo.0", statistic)
    whole.add(key, x, *heads)
    for part in x.tensor_split(sorted(cuts)):
        parts.add(key, part, *heads)
        alone = Moments()
        alone.add(key, part, *heads)
        merged = merged.merge(alone)
    same(parts, whole)
    same(merged, whole)


def test_a_moment_is_the_sum_of_outer_products_of_each_copys_heads() -> None:
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    moments.add(("vo.0", RAW), x, copies=2, heads=4)  # heads of 2 dims; two neighbours share a copy
    found = moments.known["vo.0", RAW]
    for copy in range(2):
        rows = torch.cat([x[:, 4 * copy : 4 * copy + 2], x[:, 4 * copy + 2 : 4 * copy + 4]])
        assert close(found.total[copy], rows.T @ rows)
    assert found.count == 5


def test_a_mean_is_over_tokens_and_the_heads_that_share_a_copy() -> None:
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    moments.add(("vo.0", MEAN), x, copies=2, heads=4)
    found = moments.mean(Space("vo.0", "vo", 2, Group.INVERTIBLE, 2))
    assert close(found, x.reshape(5, 2, 2, 2).mean((0, 2)))
    assert not close(
        found, x.reshape(5, 2, 2, 2).mean((0, 1))
    )  # the control: neighbours share, not every second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_batches_are_kept_in_float64(dtype: torch.dtype) -> None:
    moments = Moments()
    moments.add(("x.0.0", RAW), torch.full((1, 1), 2.0**13, dtype=dtype))
    for _ in range(100):
        moments.add(("x.0.0", RAW), torch.ones(1, 1, dtype=dtype))
    total = moments.known["x.0.0", RAW].total
    assert total.dtype is torch.float64 and total.item() == 2.0**26 + 100
    assert (
        torch.tensor(2.0**26) + 1 == 2.0**26
    )  # the control: float32 would have lost every one of them


def test_products_of_bfloat16_signals_are_exact() -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    moments = Moments()
    moments.add(("x.0.0", RAW), x)
    assert close(moments.known["x.0.0", RAW].total[0], x.double().T @ x.double(), 1e-6)


# --- The store.


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The spaces that each oneshot walk measures, a list a walk."""
    calls: list[list[str]] = []
    oneshot = walk.oneshot

    def counted(parts: Any, batches: Any, wanted: Any, *rest: Any, **options: Any) -> None:
        calls.append(sorted(wanted))
        oneshot(parts, batches, wanted, *rest, **options)

    monkeypatch.setattr(walk, "oneshot", counted)
    return calls


def test_a_second_recipe_on_the_same_model_and_tokens_measures_nothing(
    walks: list[list[str]], tmp_path: Path
) -> None:
    first = sliced(recipe(RESIDUAL, MLP), store=tmp_path)
    assert len(walks) == 1
    again = sliced(recipe(RESIDUAL, MLP), store=tmp_path)
    narrower = RESIDUAL | {"select": {"uniform": {"width": 16}}, "segments": "stage"}
    sliced(recipe(narrower, {"spaces": "mlp.1", "rotate": "permute"}), store=tmp_path)
    assert len(walks) == 1
    assert weights_digest(first.model) == weights_digest(again.model)
    sliced(recipe(RESIDUAL, MLP, HEADS), store=tmp_path)
    assert walks[1:] == [["vo.0", "vo.1"]]  # what is new, and nothing else


CHANGES: dict[str, Callable[[], tuple[Recipe, PreTrainedModel]]] = {
    "weights": lambda: (recipe(RESIDUAL), model_of("llama", seed=1)),
    "config": lambda: (recipe(RESIDUAL), model_of("llama", rms_norm_eps=1e-4)),
    "fewer tokens": lambda: (recipe(RESIDUAL, calibrate={"sequences": 31}), dense()),
    "dtype": lambda: (recipe(RESIDUAL, calibrate={"dtype": "bfloat16"}), dense()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_weights_tokens_or_numbers_are_measured_anew(
    walks: list[list[str]], tmp_path: Path, what: str
) -> None:
    sliced(recipe(RESIDUAL), store=tmp_path)
    asked, model = CHANGES[what]()
    assert asked.calibrate is not None
    found = load_tokens(
        "tokens.npy", None, vocab_size=VOCABULARY, amount=Amount(asked.calibrate.sequences)
    )
    slice_model(model, plan(asked, model.config), found, Means(tmp_path))
    assert len(walks) == 2 and len(list(tmp_path.iterdir())) == 2


def test_batch_size_and_widths_are_no_part_of_the_key(
    walks: list[list[str]], tmp_path: Path
) -> None:
    sliced(recipe(RESIDUAL), store=tmp_path)
    sliced(recipe(RESIDUAL, calibrate={"batch": 16}), store=tmp_path)
    assert len(walks) == 1


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, None])
def test_a_stored_file_that_cannot_be_read_counts_as_missing(
    walks: list[list[str]], tmp_path: Path, content: bytes | None
) -> None:
    first = sliced(recipe(RESIDUAL), store=tmp_path)
    (path,) = tmp_path.glob("*/x.1.0.raw.safetensors")
    path.write_bytes(path.read_bytes()[:-8] if content is None else content)
    again = sliced(recipe(RESIDUAL), store=tmp_path)
    assert walks[1:] == [["x.1.0"]]
    assert weights_digest(first.model) == weights_digest(again.model)
    sliced(recipe(RESIDUAL), store=tmp_path)
    assert len(walks) == 2  # and is written again


def test_an_interrupted_save_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = Moments({("x.0.0", RAW): Moment(torch.eye(3, dtype=torch.float64)[None], 7)})
    store = Store.keyed(tmp_path, {"weights": "w"})

    def stopped(_tensors: Any, path: Path, _metadata: Any = None) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            store.save(moments)
    assert list(store.folder.iterdir()) == []
    assert store.load(moments.known).known == {}
    store.save(moments)
    same(store.load(moments.known), moments)
