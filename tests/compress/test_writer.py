"""A model that goes to a sink part by part is, to the last bit, the one that is cut in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import model_of
from sliced import HEADS, MLP, RESIDUAL, recipe, tokens
from sliced import data as data

from invariance.compress import writer
from invariance.compress.means import Means
from invariance.compress.pipeline import slice_model
from invariance.compress.planner import plan
from invariance.compress.writer import Writer
from invariance.core.errors import InvarianceError
from invariance.io.sink import Memory, open_folder
from invariance.run.compress import compress

PAIRS = {
    "spaces": "qk",
    "rotate": "rope_pairs",
    "select": {"uniform": {"width": 6}},
    "slice": "truncate",
}
FACTORS = {
    "spaces": "edge",
    "rotate": "weight_svd",
    "select": {"uniform": {"keep": 0.4}},
    "slice": "truncate",
}
STEPS: dict[str, list[dict[str, Any]]] = {
    "channels": [MLP],
    "one basis": [RESIDUAL | {"segments": "global"}],
    "a basis a stage": [RESIDUAL | {"segments": "stage", "slice_head": False}, HEADS],
    "low rank": [RESIDUAL | {"segments": "block", "shortcuts": {"rank": 4}}],
    "biases": [MLP | {"slice": "bias_compensation"}],
    "pairs": [PAIRS],
    "factors": [FACTORS],
    "depth": [
        {
            "spaces": ["heads", "mlp"],
            "select": {"shortgpt": {"blocks": 1}},
            "widths": {"min": 0},
        }
    ],
}
CASES = [
    ("llama", "oneshot", "channels", "untie"),
    ("llama", "sequential", "one basis", "keep"),
    ("llama", "dense_target", "pairs", "untie"),
    ("llama", "oneshot", "low rank", "untie"),
    ("llama", "sequential", "factors", "untie"),
    ("llama", "dense_target", "depth", "untie"),
    ("opt", "oneshot", "a basis a stage", "untie"),
    ("opt", "dense_target", "channels", "untie"),
    ("phi", "sequential", "one basis", "untie"),
    ("qwen3", "dense_target", "a basis a stage", "untie"),
    ("gemma3_text", "oneshot", "channels", "untie"),
    ("llama", "oneshot", "biases", "untie"),
]


@pytest.mark.parametrize(("family", "order", "steps", "tie"), CASES)
def test_parts_make_up_the_model_that_is_cut_in_memory(
    family: str, order: str, steps: str, tie: str
) -> None:
    model = model_of(family)
    asked = recipe(*STEPS[steps], order=order, tie=tie)
    chart, sink = plan(asked, model.config), Memory()
    hand = Writer(sink, chart, torch.float32)
    found = slice_model(model, chart, tokens(), Means(receiver=hand))
    assert all(p.is_meta for e in found.layout.edges for p in stage_of(found.model, e.stage))
    assert hand.config is not None
    sink.finish(hand.config)
    whole, made = compress(model, asked), sink.model
    assert made is not None and type(made) is type(whole)
    expected, states = whole.state_dict(), made.state_dict()
    assert expected.keys() == states.keys()
    assert all(torch.equal(states[n], expected[n]) for n in expected)
    assert hand.parameters == sum(p.numel() for p in whole.parameters())


def stage_of(model: torch.nn.Module, path: str) -> list[torch.nn.Parameter]:
    return list(model.get_submodule(path).parameters())


def test_parts_that_the_familys_own_code_computes_otherwise_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama")
    chart = plan(recipe(MLP), model.config)
    placed = writer.placed

    def faulty(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        placed(module, {n: t * 1.01 for n, t in tensors.items()})

    monkeypatch.setattr(writer, "placed", faulty)
    with pytest.raises(InvarianceError, match="logits differ"):
        slice_model(model, chart, tokens(), Means(receiver=Writer(Memory(), chart, torch.float32)))


@pytest.mark.parametrize("order", ["oneshot", "dense_target"])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(order: str, tmp_path: Path) -> None:
    model = model_of("llama")
    chart = plan(recipe(MLP, HEADS, order=order), model.config)

    def carry_out(target: Path, stop: str | None = None) -> tuple[str, ...]:
        sink = open_folder(target, "key")
        hand = Writer(sink, chart, torch.float32)
        stage = hand.stage

        def stopping(parts: Any, edge: Any) -> None:
            if edge.stage == stop:
                raise KeyboardInterrupt
            stage(parts, edge)

        hand.stage = stopping  # type: ignore[method-assign]
        try:
            slice_model(model, chart, tokens(), Means(tmp_path / "store", receiver=hand))
        except KeyboardInterrupt:
            sink.lock.release()
            return sink.finished
        assert hand.config is not None
        sink.finish(hand.config)
        return sink.finished

    assert carry_out(tmp_path / "whole") == ()
    assert carry_out(tmp_path / "killed", stop=chart.layout.edges[2].stage) == ()
    stages = tuple(e.stage for e in chart.layout.edges[:2])
    assert carry_out(tmp_path / "killed") == stages  # these were not written again
    whole, again = (tmp_path / n / "model.safetensors" for n in ("whole", "killed"))
    assert whole.read_bytes() == again.read_bytes()
