"""What a plan says that its run takes, and the refusal where that is not there."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
import torch
from folders import model_of
from sliced import HEADS, MLP, RESIDUAL, recipe
from sliced import data as data

from invariance.compress.needs import Needs, needs
from invariance.compress.planner import plan
from invariance.core.errors import InputError


def of(*steps: Any, tokens: int = 1000, **keys: Any) -> Needs:
    chart = plan(recipe(*steps, **keys), model_of("llama").config)
    return needs(chart, tokens, torch.float32)


def test_more_tokens_and_more_spaces_take_more() -> None:
    many = 2 * 10**6
    assert of(MLP, tokens=many).memory > of(MLP).memory
    assert of(MLP, tokens=many, order="dense_target").memory > of(MLP, tokens=many).memory
    moments = [8 * 64**2 * 2, 8 * 64**2 * 2 + 8 * 2 * 8**2 * 2]
    numbers = [of(*steps).disk - moments[n] for n, steps in enumerate(([MLP], [MLP, HEADS]))]
    assert numbers[0] > numbers[1] > 0  # what is left is the checkpoint, smaller by the heads' cut


def test_what_needs_all_of_the_model_says_so() -> None:
    asked = {"budget": {"parameters": 0.9}, "nested": [0.8]}
    whole = of(MLP | {"select": "uniform", "slice": "truncate"}, **asked)
    assert whole.whole == "`nested`" and of(MLP, RESIDUAL).whole is None


def test_a_run_that_takes_more_than_there_is_is_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = type("There", (), {"available": 2_500_000_000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)
    Needs(2_400_000_000, 0).check("r.yaml:1")
    with pytest.raises(InputError, match=r"r\.yaml:1: .*up to 7\.1 GB.*`recover`.* 2\.5 GB"):
        Needs(7_100_000_000, 0, "`recover`").check("r.yaml:1")
