"""Tiny models of types that nobody declared, and recipes carried out on their derived layouts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from invariance.compress.derived.cut import Made, carry_out
from invariance.compress.derived.layout import DerivedLayout, derived_spaces
from invariance.compress.derived.plan import derived_plan
from invariance.io.data import Tokens
from invariance.io.layouts import derived_layout
from invariance.model.tiny import tiny
from invariance.recipe.recipe import Recipe

IDS = torch.randint(3, 60, (16, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", autouse=True)
def cache_of_layouts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@cache
def model_of(kind: str) -> tuple[PreTrainedModel, DerivedLayout]:
    model = tiny(kind).model.float()
    assert isinstance(model, PreTrainedModel)
    return model, derived_spaces(model.config, derived_layout(model.config))


def recipe(*steps: dict[str, Any], **more: Any) -> Recipe:
    return Recipe.from_dict(
        {"model": "tiny", "calibrate": {"data": "t.npy"}, "steps": list(steps), **more}
    )


def cut(model: PreTrainedModel, layout: DerivedLayout, asked: Recipe, ids: Tensor = IDS) -> Made:
    """Carried out; what is stored is what was planned."""
    plan = derived_plan(asked, model.config, layout)
    found = carry_out(model, plan, Tokens(ids, torch.ones_like(ids, dtype=torch.bool), ()))
    numbers = sum(p.numel() for p in found.model.parameters())
    assert numbers == plan.parameters(found.widths).total
    return found


def made(kind: str, *steps: dict[str, Any], **more: Any) -> Made:
    return cut(*model_of(kind), recipe(*steps, **more))


def differs(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())
