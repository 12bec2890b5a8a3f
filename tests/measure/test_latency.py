"""Latency by width: the table, what it predicts, and a budget of it. No test looks at how long anything took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import model_of

from invariance.compress import planner
from invariance.core.errors import InputError
from invariance.measure import latency
from invariance.measure.latency import Latency, table
from invariance.model.canonical import layout_of
from invariance.recipe.recipe import Recipe

FAKE = Latency(
    {
        "attention": {
            "residual": {16: 3.0, 32: 4.0},
            "heads": {1: 2.0, 2: 4.0},
            "qk": {4: 3.5, 8: 4.0},
            "vo": {4: 3.0, 8: 4.0},
        },
        "mlp": {
            "residual": {16: 5.0, 32: 10.0},
            "mlp": {16: 4.0, 32: 3.0, 64: 10.0},
        },  # noise: 32 below 16
        "head": {"residual": {16: 2.0, 32: 2.0}},
    }
)
DENSE = 2 * (4.0 + 10.0) + 2.0
MLP = {"spaces": "mlp", "rotate": "permute", "select": "uniform"}


def test_parts_add_up_shares_multiply_and_curves_never_fall() -> None:
    layout = layout_of(model_of("llama").config, fold=True)
    assert FAKE.seconds(layout, {}, 0) == pytest.approx(DENSE)
    assert FAKE.seconds(layout, {"mlp.0": 48}, 0) == pytest.approx(
        DENSE - 3
    )  # half way from 4 to 10
    assert FAKE.seconds(layout, {"mlp.0": 32}, 0) == FAKE.seconds(layout, {"mlp.0": 16}, 0)
    assert FAKE.seconds(layout, {"mlp.0": 8}, 0) == FAKE.seconds(layout, {"mlp.0": 16}, 0)
    assert FAKE.seconds(layout, {"mlp.0": 0}, 0) == pytest.approx(DENSE - 10)
    both = {"qk.1": 4, "vo.1": 4, "heads.1": 1}
    assert FAKE.seconds(layout, both, 0) == pytest.approx(DENSE - 4 + 4 * (1 - 1 / 8 - 1 / 4) / 2)
    assert FAKE.seconds(layout, {p: 16 for p in layout.points}, 0) == pytest.approx(
        DENSE - 2 * (1 + 5)
    )
    assert FAKE.seconds(layout, {}, 3) > FAKE.seconds(layout, {}, 0)


def test_heads_cut_to_one_width_count_as_they_were_timed_together() -> None:
    """Alone, neither queries and keys nor values save anything here, as with kernels made for equal widths."""
    alone = {
        "residual": {32: 4.0},
        "heads": {2: 4.0},
        "qk": {4: 6.0, 8: 4.0},
        "vo": {4: 4.0, 8: 4.0},
    }
    curves = {**FAKE.curves, "attention": alone | {latency.TOGETHER: {4: 1.0, 8: 4.0}}}
    layout = layout_of(model_of("llama").config, fold=True)
    made = Latency(curves)
    whole = made.seconds(layout, {}, 0)
    assert made.seconds(layout, {"qk.0": 4}, 0) == made.seconds(layout, {"vo.0": 4}, 0) == whole
    assert made.seconds(layout, {"qk.0": 4, "vo.0": 4}, 0) == pytest.approx(whole - 3)
    assert made.seconds(layout, {"qk.0": 4, "vo.0": 6}, 0) == pytest.approx(whole - 1.5)
    assert (
        Latency({**FAKE.curves, "attention": alone}).seconds(layout, {"qk.0": 4, "vo.0": 4}, 0)
        == whole
    )  # the control


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
@pytest.mark.parametrize("steady", [True, False])
def test_a_table_whose_rounds_disagree_is_used_and_not_kept(
    family: str, steady: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, int] = {}

    def timed(block: Any, *_: Any) -> dict[str, float]:
        seen[id(block)] = seen.get(id(block), 0) + 1
        return dict.fromkeys(latency.READ_BY, 1.0 if steady or seen[id(block)] % 2 else 2.0)

    monkeypatch.setattr(latency, "_timed", timed)
    config = model_of(family).config
    assert table(config, tmp_path).steady == steady
    assert len(list(tmp_path.glob("*.json"))) == steady


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_a_table_has_all_parts_and_is_measured_once(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen = model_of(family).config, list[str]()

    def progress(items: Any, what: str, total: int) -> Any:
        seen.append(what)
        assert total == len(items)
        return items

    monkeypatch.setattr(latency, "ROUNDS", 2)
    made = table(config, tmp_path, progress=progress)
    assert {p: tuple(kinds) for p, kinds in made.curves.items()} == latency.READ_BY
    layout = layout_of(config, fold=True)
    for kinds in made.curves.values():
        for kind, curve in kinds.items():
            space = next(s for s in layout.spaces.values() if s.kind == kind.split("+")[0])
            assert max(curve) == space.dim and all(
                space.fits(k) and s > 0 for k, s in curve.items()
            )
            assert len(curve) > 1
    assert table(config, tmp_path, progress=progress) == made and len(seen) == 1
    (path,) = tmp_path.glob("*.json")
    path.write_text("{", encoding="utf-8")  # damaged: measured again
    table(config, tmp_path, progress=progress)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)  # another machine
    table(config, tmp_path, progress=progress)
    assert len(seen) == 3 and len(list(tmp_path.glob("*.json"))) == 2


@pytest.mark.parametrize("select", ["uniform", "global_energy", "greedy"])
def test_a_budget_of_latency_is_kept_and_spent(
    select: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "table", lambda *_: FAKE)
    recipe = {
        "model": "m",
        "calibrate": {"data": "tokens.npy"},
        "budget": {"latency": 0.8},
        "steps": [MLP | {"select": select}],
    }
    chart = planner.plan(Recipe.from_dict(recipe), model_of("llama").config)
    energies = {u.space.name: torch.arange(64.0).flip(0)[None] + 1 for u in chart.units}
    widths = chart.allocate(energies)
    assert widths is not None
    seconds = chart.seconds(widths)
    assert seconds is not None and seconds <= 0.8 * DENSE
    wider = chart.seconds({n: k + 1 for n, k in widths.items()})
    assert wider is not None and wider > 0.8 * DENSE


def test_a_latency_that_no_width_reaches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "table", lambda *_: replace(FAKE))
    recipe = {
        "model": "m",
        "budget": {"latency": 0.3},
        "steps": [{"spaces": "mlp", "select": "uniform"}],
    }
    with pytest.raises(InputError, match="nanoseconds of latency cannot be met"):
        planner.plan(Recipe.from_dict(recipe), model_of("llama").config)


def test_other_budgets_time_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "table", lambda *_: pytest.fail("a table was asked for"))
    recipe = {
        "model": "m",
        "budget": {"flops": 0.9},
        "steps": [{"spaces": "mlp", "select": "uniform"}],
    }
    assert planner.plan(Recipe.from_dict(recipe), model_of("llama").config).seconds({}) is None
