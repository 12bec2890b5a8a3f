"""Tiny models sliced by recipes on tokens on disk, and comparisons of what is measured of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import VOCABULARY, model_of, workplace
from torch import Tensor
from transformers import PreTrainedModel

from invariance.calibrate import walk
from invariance.calibrate.batch import Batch
from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.compress.means import Means
from invariance.compress.pipeline import slice_model
from invariance.compress.planner import plan
from invariance.compress.sliced import Sliced
from invariance.io.data import Tokens, load_tokens
from invariance.model.canonical import canonicalize
from invariance.model.layout import Layout
from invariance.model.working import Stages
from invariance.recipe.recipe import Recipe

RAW, NORMED, MEAN, WEIGHTED = Statistic.RAW, Statistic.NORMED, Statistic.MEAN, Statistic.WEIGHTED
RESIDUAL = {"spaces": "residual", "rotate": "pca", "select": {"uniform": {"width": 24}}}
MLP = {
    "spaces": "mlp",
    "rotate": "permute",
    "select": {"uniform": {"width": 40}},
    "slice": "least_squares",
}
HEADS = {"spaces": "vo", "rotate": "head_svd", "select": {"uniform": {"width": 6}}}
ROUNDING = 1e-12  # of sums of a few hundred float64 products, relative


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with workplace(tmp_path_factory.mktemp("sliced"), sequences=32):
        yield


@cache
def dense(family: str = "llama", **options: Any) -> PreTrainedModel:
    return model_of(family, **options)


def tokens() -> Tokens:
    return load_tokens("tokens.npy", None, vocab_size=VOCABULARY)


def recipe(*steps: dict[str, Any], calibrate: dict[str, Any] | None = None, **keys: Any) -> Recipe:
    found = {"data": "tokens.npy", "dtype": "float32", "batch": 4} | (calibrate or {})
    return Recipe.from_dict({"model": "m", "calibrate": found, "steps": list(steps)} | keys)


def sliced(
    asked: Recipe, model: PreTrainedModel | None = None, store: Path | None = None
) -> Sliced:
    model = dense() if model is None else model
    return slice_model(model, plan(asked, model.config), tokens(), Means(store))


def taken(parts: Stages, batches: list[Batch], wanted: Any, dtype: torch.dtype) -> Moments:
    """The moments of a oneshot walk."""
    found = [Moments()]
    walk.oneshot(parts, batches, wanted, dtype, leave=lambda _, m: found.append(found[-1].merge(m)))
    return found[-1]


def close(one: Tensor, other: Tensor, bound: float = ROUNDING) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= bound * other.abs().max())


def exact(family: str, fold: bool = True, **options: Any) -> tuple[PreTrainedModel, Layout]:
    """A float64 model in canonical form."""
    model = model_of(family, **options).double()
    model.config._attn_implementation = "sdpa"
    return model, canonicalize(model, fold=fold)


def real(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, torch.ones_like(ids, dtype=torch.bool)


def same(one: Moments, other: Moments, bound: float = ROUNDING) -> None:
    assert one.known.keys() == other.known.keys()
    for key, moment in one.known.items():
        assert moment.count == pytest.approx(other.known[key].count, rel=bound), key
        assert close(moment.total, other.known[key].total, bound), key
