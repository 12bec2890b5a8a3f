"""Selectors in recipes: influence measured, runs end to end on a tiny model, losses foretold, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import VOCABULARY, model_of
from sliced import data as data
from sliced import taken, tokens
from torch import Tensor
from transformers import PreTrainedModel

from invariance.calibrate.enter import enter
from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.compress import heldout
from invariance.compress.means import Means
from invariance.compress.pipeline import slice_model
from invariance.compress.planner import plan
from invariance.compress.sliced import Sliced
from invariance.core.change import Basis
from invariance.core.errors import InputError
from invariance.core.group import Group
from invariance.core.space import Space
from invariance.io.data import Tokens
from invariance.method.interfaces import Rotator, find
from invariance.model.canonical import canonicalize
from invariance.model.working import Whole
from invariance.recipe.recipe import Recipe
from invariance.run.outcome import outcome

# --- Influence, measured.


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_influence_of_a_block_is_that_of_its_streams(family: str) -> None:
    model = model_of(family).double()
    ids = torch.randint(1, VOCABULARY, (6, 10), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        streams: list[Tensor] = []
        for block in model.get_submodule("model.layers").children():
            block.register_forward_hook(
                lambda _m, a, y: streams.extend((a[0], y if torch.is_tensor(y) else y[0]))
            )
        model(input_ids=ids)
    expected = [
        torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()
        for a, b in zip(streams[::2], streams[1::2], strict=True)
    ]
    model = model_of(family).double()
    layout = canonicalize(model, fold=False)
    wanted = {f"x.{i}.0": frozenset({Statistic.COSINE}) for i in range(2)}

    def found(batches: list[Tensor]) -> Moments:
        parts = Whole(model, layout)
        entered = enter(
            parts,
            [(b, torch.ones_like(b, dtype=torch.bool)) for b in batches],
            torch.float64,
        )
        return taken(parts, entered, wanted, torch.float64)

    whole, parts = found([ids]), [found([part]) for part in ids.split(2)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    for i, cosine in enumerate(expected):
        key = (f"x.{i}.0", Statistic.COSINE)
        assert whole.known[key].mean.item() == pytest.approx(cosine, abs=1e-5) and cosine < 0.999
        assert merged.known[key].mean.item() == pytest.approx(cosine, abs=1e-5)
        assert merged.known[key].count == ids.numel()


# --- End to end.

MLP = {"spaces": "mlp", "rotate": "permute", "slice": "least_squares"}
HEADS = {"spaces": "vo", "rotate": "head_svd"}
STREAM = {"spaces": "residual", "rotate": "pca"}
NAMED: list[Any] = [
    "influence",
    {"global_energy": {"of": "absolute"}},
    "dynamic_programming",
    {"dynamic_programming": {"curves": "measured", "points": 2}},
    {"sensitivity": {"points": 2}},
    "greedy",
    {"greedy": {"loss": "measured", "step": 0.25}},
    {"cma_es": {"evaluations": 12}},
]


def recipe(select: Any, *steps: dict[str, Any], **keys: Any) -> Recipe:
    text = {
        "model": "m",
        "calibrate": {"data": "tokens.npy", "dtype": "float32", "batch": 8},
        "budget": {"parameters": 0.85},
        "steps": [step | {"select": select} for step in steps or (MLP, HEADS)],
    }
    return Recipe.from_dict(text | keys)


def sliced(
    asked: Recipe, store: Path | None = None, model: PreTrainedModel | None = None
) -> Sliced:
    model = model or model_of("llama")
    return slice_model(model, plan(asked, model.config), tokens(), Means(store))


@pytest.mark.parametrize("order", ["oneshot", "sequential", "dense_target"])
@pytest.mark.parametrize("select", NAMED, ids=str)
def test_every_selector_runs_from_a_recipe_to_a_report(select: Any, order: str) -> None:
    evaluate = [{"perplexity": {"data": "tokens.npy"}}]
    found = outcome(model_of("llama"), recipe(select, order=order, evaluate=evaluate)).report
    assert found["parameters"]["sliced"]["total"] <= 0.85 * found["parameters"]["dense"]["total"]
    assert any(k < found["dims"][s] for s, k in found["widths"].items())
    ratio = found["perplexity"]["tokens.npy"]["sliced"] / found["perplexity"]["tokens.npy"]["dense"]
    assert found["predicted"]["measured"] == pytest.approx(math.log(ratio))
    measures = (
        find("select", "sensitivity").name in str(select)
        or "measured" in str(select)
        or "cma" in str(select)
    )
    assert (found["search"] is not None) == measures == (found["predicted"]["by"] == "selector")
    assert found["predicted"]["by"] in ("selector", "gradients") and found["predicted"]["loss"] > 0
    if measures:
        assert found["search"]["evaluations"] >= 2 and found["search"]["seconds"] >= 0
    json.dumps(found)


@pytest.mark.parametrize("order", ["oneshot", "sequential"])
@pytest.mark.parametrize(
    "select", ["influence", "dynamic_programming", {"sensitivity": {"points": 2}}, "greedy"]
)
def test_the_stream_may_be_cut_with_the_rest(select: Any, order: str) -> None:
    asked = recipe(select, STREAM, MLP, HEADS, budget={"parameters": 0.7}, order=order)
    sizes = outcome(model_of("llama"), asked).report["parameters"]
    assert sizes["sliced"]["total"] <= 0.7 * sizes["dense"]["total"]


def test_what_is_measured_is_the_loss_of_the_model_that_comes_out() -> None:
    """The float32 copy that is measured, and what a oneshot run makes of the same widths."""
    asked = recipe({"greedy": {"loss": "measured", "step": 0.5}})
    found = sliced(asked)
    _, held = heldout.split(tokens(), "")
    from invariance.measure.losses import perplexity

    dense, after = (math.log(perplexity(m.float(), held)) for m in (model_of("llama"), found.model))
    assert (
        found.foretold.loss == pytest.approx(after - dense, abs=1e-4) and abs(after - dense) > 1e-3
    )


def test_held_out_sequences_take_no_part_in_the_calibration() -> None:
    train, held = heldout.split(tokens(), "")
    assert len(held.ids) == 4 and torch.equal(torch.cat([train.ids, held.ids]), tokens().ids)
    model = model_of("llama")
    asked = recipe({"sensitivity": {"points": 1}})
    other = tokens()
    other.ids[-4:] = other.ids[-4:].flip(0, 1)
    one, two = (
        slice_model(model, plan(asked, model.config), t).spectra["mlp.0"] for t in (tokens(), other)
    )
    assert torch.equal(one, two)
    other.ids[0] = other.ids[0].flip(0) % 7 + 1  # the control
    assert not torch.equal(
        one, slice_model(model, plan(asked, model.config), other).spectra["mlp.0"]
    )


def test_an_interrupted_search_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe({"cma_es": {"evaluations": 17}})
    through = sliced(asked, tmp_path / "other")
    measure, calls = heldout.HeldOut._measure, [0]

    def failing(self: Any, cut: Any) -> float:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return measure(self, cut)

    monkeypatch.setattr(heldout.HeldOut, "_measure", failing)
    with pytest.raises(KeyboardInterrupt):
        sliced(asked, tmp_path)
    again = sliced(asked, tmp_path)
    assert through.search and again.search and again.widths == through.widths
    assert again.foretold.loss == pytest.approx(through.foretold.loss)
    assert again.search["evaluations"] == through.search["evaluations"]
    assert again.search["measured"] == through.search["measured"] - 5
    third = sliced(asked, tmp_path)
    assert third.search and third.search["measured"] == 0 and third.widths == through.widths
    other = sliced(
        recipe({"cma_es": {"evaluations": 17}}, MLP | {"rotate": "identity"}, HEADS), tmp_path
    )
    assert other.search and other.search["measured"] > 0  # the control: another search


@pytest.mark.parametrize("content", ["", "[]", '{"": "x"}', '{"mlp.0=1": 1'])
def test_a_damaged_memory_of_losses_counts_as_missing(tmp_path: Path, content: str) -> None:
    asked = recipe({"sensitivity": {"points": 1}})
    first = sliced(asked, tmp_path)
    (file,) = tmp_path.rglob("losses.*.json")
    file.write_text(content)
    again = sliced(asked, tmp_path)
    assert (
        again.search and first.search and again.search["measured"] == first.search["measured"] > 0
    )
    assert again.widths == first.widths


# --- What the energies predict.


@dataclass(frozen=True)
class InNats(Rotator):
    """Channels as they are, with energies that are losses by their own word."""

    name = "in_nats"
    produces = Group.PERMUTATION
    nats = True

    def fit(self, space: Space, moments: Moments) -> Basis:
        eye = torch.eye(space.dim, dtype=torch.float64).repeat(space.copies, 1, 1)
        return Basis(eye, torch.full((space.copies, space.dim), 0.01, dtype=torch.float64))


def test_energies_in_nats_predict_a_loss_and_gradients_where_others_are() -> None:
    asked = recipe({"uniform": {"width": 40}}, MLP, budget=None)
    assert sliced(asked).foretold.by == "gradients"
    chart = plan(asked, model_of("llama").config)
    truncate = find("slice", "truncate")()
    nats = replace(
        chart, units=tuple(replace(u, rotate=InNats(), slice=truncate) for u in chart.units)
    )
    found = slice_model(model_of("llama"), nats, tokens())
    assert found.foretold.by == "energies" and found.foretold.loss == pytest.approx(2 * 24 * 0.01)
    refit = replace(chart, units=tuple(replace(u, rotate=InNats()) for u in chart.units))
    found = slice_model(model_of("llama"), refit, tokens())
    assert found.foretold.by == "gradients"  # energies that assume no refit


# --- Refusals.

BAD: list[tuple[Any, str]] = [
    ({"influence": {"epsilon": 0.0}}, "epsilon must be above 0"),
    ({"sensitivity": {"points": 0}}, "points must be at least 1"),
    ({"greedy": {"step": 0.0}}, "step must be above 0"),
    ({"greedy": {"loss": "measured", "of": "absolute"}}, "`of` is about spectra"),
    ({"dynamic_programming": {"curves": "measured", "of": "absolute"}}, "`of` is about spectra"),
    ({"dynamic_programming": {"points": 4}}, "`points` is about measured curves"),
    ({"cma_es": {"evaluations": 0}}, "evaluations must be at least 1"),
    ({"cma_es": {"sigma": 2.0}}, "sigma must be"),
]


@pytest.mark.parametrize(("select", "message"), BAD, ids=str)
def test_options_that_cannot_be_are_refused(select: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe(select)


@pytest.mark.parametrize("select", ["influence", "sensitivity", "cma_es"])
def test_without_data_or_a_budget_a_measuring_selector_is_refused(select: str) -> None:
    step = {"spaces": "mlp", "select": select}
    with pytest.raises(InputError, match=r"reads moments|measures losses.*no data"):
        Recipe.from_dict({"model": "m", "budget": {"parameters": 0.8}, "steps": [step]})
    with pytest.raises(InputError, match="spends a budget"):
        Recipe.from_dict({"model": "m", "calibrate": {"data": "d"}, "steps": [step]})


@pytest.mark.parametrize("select", ["influence", "sensitivity", "greedy"])
def test_an_infeasible_budget_is_refused_before_anything_is_measured(select: str) -> None:
    asked = recipe(select, MLP, budget={"parameters": 0.1})
    with pytest.raises(InputError, match="cannot be met"):
        plan(asked, model_of("llama").config)


def test_too_few_sequences_to_hold_one_out_are_refused() -> None:
    asked, model = recipe("sensitivity"), model_of("llama")
    few = Tokens(tokens().ids[:7], tokens().mask[:7])
    with pytest.raises(InputError, match=r"7 sequences of 2 tokens or more.*holds out one in 8"):
        slice_model(model, plan(asked, model.config), few)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"package `cma` is not installed.*invariance\[search\]"):
        recipe("cma_es")


def test_narrowest_heads_of_every_block_leave_one_attention() -> None:
    def heads(budget: float) -> Recipe:
        steps = [
            {"spaces": n, "rotate": "permute", "select": "global_energy", "widths": {"min": 0}}
            for n in ("heads", "mlp")
        ]
        return recipe("global_energy", *steps, budget={"parameters": budget})

    config = model_of("llama").config
    with pytest.raises(InputError) as e:
        plan(heads(0.01), config)
    share = float(str(e.value).split("`parameters: ")[1].split("`")[0])
    chart = plan(heads(share), config)
    flat = {u.space.name: torch.ones(u.space.copies, u.space.dim) for u in chart.units}
    widths = chart.allocate(flat)
    assert widths is not None and widths["heads.0"] == 1
    assert not any(k for n, k in widths.items() if n != "heads.0")
    assert chart.parameters(widths).total <= share * chart.parameters({}).total
