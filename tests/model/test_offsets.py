"""Offsets: a mean in place of what is gone, in the readers' biases; through changes, checkpoints and budgets."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import VOCABULARY, model_of, save_tokens, stored_numbers
from hypothesis import given
from hypothesis import strategies as st
from projected import project
from tiny import canonical_copy, fewer, seeds, tiny_models, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from invariance.calibrate.moments import Moment, Moments
from invariance.calibrate.statistic import Statistic
from invariance.compress.planner import plan
from invariance.core.change import Basis, Change
from invariance.core.errors import InputError, InvarianceError
from invariance.core.space import Space
from invariance.io.checkpoint import InvarianceForCausalLM
from invariance.method.interfaces import find
from invariance.model import reparametrize as operator
from invariance.model.labels import label
from invariance.model.layout import Layout
from invariance.model.reparametrize import reparametrize
from invariance.model.verify import logits, relative_error, tolerance
from invariance.recipe.recipe import Recipe
from invariance.run.outcome import Outcome, outcome

FAR = 1e5  # times the tolerance; what a fault must reach
IDS = torch.arange(1, 25)[None] % VOCABULARY
FLAP = {
    "spaces": "mlp",
    "rotate": "fluctuation",
    "select": {"uniform": {"width": 40}},
    "slice": "bias_compensation",
}
HEADS = {
    "spaces": "vo",
    "rotate": "head_svd",
    "select": {"uniform": {"width": 6}},
    "slice": "bias_compensation",
}
GROUPS = FLAP | {"spaces": "heads", "select": {"uniform": {"width": 1}}}
STAGES = {
    "spaces": "residual",
    "segments": "stage",
    "rotate": "pca",
    "select": {"uniform": {"width": 24}},
}


def drawn(space: Space, k: int, seed: int) -> Change:
    """A slice of a random group element, and an offset of the size of the signal."""
    whole = Change.rotation(space.element(seed))
    offset = torch.randn(
        space.copies, space.dim, generator=space.generator(seed + 1), dtype=torch.float64
    )
    return replace(whole.columns(torch.arange(k)), offset=offset)


def offsets(layout: Layout, seed: int = 0) -> dict[str, Change]:
    """Slices with offsets of all inner spaces that can have one; rotations of the points around them."""
    inner = {
        n: drawn(s, s.dim - 1, seed) for n, s in layout.spaces.items() if s.kind in ("mlp", "vo")
    }
    return inner | {p: Change.rotation(layout.spaces[p].element(seed)) for p in layout.points}


def meaning(model: PreTrainedModel, layout: Layout, changes: dict[str, Change]) -> None:
    """Make a dense model compute x ↦ D Eᵀx + o at each space: no bias touched, the offset added to the signal."""
    project(model, layout, changes)
    for edge in layout.edges:
        stage, i = model.get_submodule(edge.stage), edge.source.split(".")[1]
        found = {
            f"vo.{i}": stage.attention and stage.attention.out,
            f"mlp.{i}": stage.mlp and stage.mlp.down,
        }
        for name, reader in found.items():
            if reader is None or name not in changes or changes[name].offset is None:
                continue
            offset = changes[name].offset
            runs = reader.in_features // offset.numel()
            shift = offset.repeat_interleave(runs, 0).flatten()
            reader.register_forward_pre_hook(lambda _, args, o=shift: (args[0] + o,))


def error(model: PreTrainedModel, seed: int = 0, *, one_at_a_time: bool = False) -> float:
    """Logit error, in tolerances, of changes with offsets against what they mean."""
    dense, layout = canonical_copy(model, fold=True, tie="untie")
    changed, _ = canonical_copy(model, fold=True, tie="untie")
    changes = offsets(layout, seed)
    meaning(dense, layout, changes)
    for some in [{n: c} for n, c in changes.items()] if one_at_a_time else [changes]:
        reparametrize(changed, layout, some)
    return relative_error(logits(dense, tokens()), logits(changed, tokens())) / tolerance(
        torch.float64, layout.depth
    )


# The operator


@fewer
@given(model=tiny_models(), seed=seeds, one_at_a_time=st.booleans())
def test_an_offset_is_added_to_what_readers_read(
    model: PreTrainedModel, seed: int, one_at_a_time: bool
) -> None:
    assert error(model, seed, one_at_a_time=one_at_a_time) <= 1


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_a_forgotten_offset_is_caught(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(model_of(family)) <= 1
    monkeypatch.setattr(operator, "_shift_readers", lambda *_: None)
    assert error(model_of(family)) > FAR


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_an_offset_applied_twice_is_caught(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    once = operator._shift_readers

    def twice(*arguments: Any) -> None:
        once(*arguments)
        once(*arguments)

    assert error(model_of(family)) <= 1
    monkeypatch.setattr(operator, "_shift_readers", twice)
    assert error(model_of(family)) > FAR


def test_a_new_bias_left_behind_when_the_stream_turns_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert error(model_of("llama"), one_at_a_time=True) <= 1
    monkeypatch.setattr(operator, "_new_biases", lambda *_: {})
    assert error(model_of("llama"), one_at_a_time=True) > FAR


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_successive_changes_of_a_space_are_their_product(family: str) -> None:
    """x ↦ D₁(D₂E₂ᵀE₁ᵀx + o₂) + o₁."""
    model = model_of(family)
    one, layout = canonical_copy(model, fold=True, tie="untie")
    two = copy.deepcopy(one)
    product = {}
    for name in layout.select(["mlp", "vo"]):
        space = layout.spaces[name]
        first = drawn(space, space.dim - 1, 0)
        reparametrize(two, label(two), {name: first})
        narrower = label(two).spaces[name]
        second = drawn(narrower, space.dim - 2, 5)
        reparametrize(two, label(two), {name: second})
        assert first.offset is not None and second.offset is not None
        carried = (first.decode.matrix() @ second.offset.unsqueeze(-1)).squeeze(-1)
        product[name] = Change(
            first.encode.matrix() @ second.encode.matrix(),
            first.decode.matrix() @ second.decode.matrix(),
            first.offset + carried,
        )
    reparametrize(one, layout, product)
    bound = tolerance(torch.float64, layout.depth)
    assert relative_error(logits(one, tokens()), logits(two, tokens())) <= bound
    forgetful = copy.deepcopy(model).double()
    forgetful, _ = canonical_copy(model, fold=True, tie="untie")
    reparametrize(
        forgetful,
        layout,
        {n: replace(c, offset=offsets(layout)[n].offset) for n, c in product.items()},
    )
    assert relative_error(logits(one, tokens()), logits(forgetful, tokens())) > FAR * bound


@pytest.mark.parametrize(
    ("name", "why"), [("x.0.1", "a norm stands"), ("qk.0", "queries multiply keys")]
)
def test_an_offset_that_nothing_adds_up_is_refused_before_a_weight_changes(
    name: str, why: str
) -> None:
    model, layout = canonical_copy(model_of("llama"), fold=True, tie="untie")
    before = logits(model, tokens())
    space = layout.spaces[name]
    offset = torch.ones(space.copies, space.dim, dtype=torch.float64)
    change = replace(Change.rotation(space.element(0)), offset=offset)
    with pytest.raises(InvarianceError, match=why):
        reparametrize(model, layout, {**offsets(layout), name: change})
    with pytest.raises(InvarianceError, match=r"shape \(1, 5\).*\(1, 64\) would fit"):
        mlp = drawn(layout.spaces["mlp.0"], 40, 0)
        reparametrize(model, layout, {"mlp.0": replace(mlp, offset=torch.ones(1, 5).double())})
    assert torch.equal(before, logits(model, tokens()))


# The slicer


def test_the_mean_of_what_is_gone_is_kept() -> None:
    g = torch.Generator().manual_seed(0)
    x = (
        torch.randn(200, 12, generator=g, dtype=torch.float64)
        + 2 * torch.rand(12, generator=g).double()
    )
    space = Space("mlp.0", "mlp", 12, find("rotate", "permute").produces)
    moments = Moments({("mlp.0", Statistic.MEAN): Moment(x.sum(0)[None], 200)})
    basis = find("rotate", "identity")().fit(space, moments)

    def left(slicer: str) -> Tensor:
        change = find("slice", slicer)().cut(space, basis, 7, moments)
        read = x @ change.encode.matrix()[0] @ change.decode.matrix()[0].mT
        return x - (read if change.offset is None else read + change.offset)

    kept = left("bias_compensation")
    assert kept.mean(0).abs().max() < 1e-12 and bool((kept[:, :7] == 0).all())
    assert torch.allclose(
        kept.square().sum(), (x - x.mean(0))[:, 7:].square().sum()
    )  # what still varies
    assert left("truncate").mean(0).abs().max() > 0.1  # the control


def test_the_mean_of_all_that_a_group_gave_is_kept() -> None:
    g = torch.Generator().manual_seed(0)
    x = (
        torch.randn(200, 12, generator=g, dtype=torch.float64)
        + 2 * torch.rand(12, generator=g).double()
    )
    space = Space("heads.0", "heads", 4, find("rotate", "permute").produces, grain=3)
    moments = Moments({("heads.0", Statistic.MEAN): Moment(x.sum(0)[None], 200)})
    A = torch.eye(4, dtype=torch.float64)[:, [2, 0, 3, 1]]
    change = find("slice", "bias_compensation")().cut(
        space, Basis(A[None], torch.ones(1, 4)), 3, moments
    )
    assert change.offset is not None and change.offset.shape == (1, 12)
    gone = torch.zeros(12, dtype=torch.bool)
    gone[3:6] = True  # group 1
    assert torch.equal(change.offset[0], torch.where(gone, x.mean(0), 0))


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_values_and_groups_that_share_readers_are_made_up_for_once(family: str) -> None:
    """Where both are cut in one call: a signal at its mean passes as it was."""
    model, layout = canonical_copy(model_of(family), fold=True, tie="untie")
    space, groups = layout.spaces["vo.0"], layout.spaces["heads.0"]
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(space.copies, space.dim, generator=g, dtype=torch.float64)
    r = (
        groups.grain // space.dim
    )  # every query head of a group gives the same here, so that both means speak of it
    mean = shared.repeat_interleave(r, 0).flatten()[None]
    means = {
        ("vo.0", Statistic.MEAN): Moment(shared, 1),
        ("heads.0", Statistic.MEAN): Moment(mean, 1),
    }
    slicer, moments = find("slice", "bias_compensation")(), Moments(means)
    values = slicer.cut(
        space, Basis(space.element(1), torch.ones(space.copies, space.dim)), space.dim - 1, moments
    )
    kept = slicer.cut(groups, Basis(groups.element(2), torch.ones(1, groups.dim)), 1, moments)
    path = layout.edges[0].stage + ".attention.out"
    before = model.get_submodule(path)(mean)
    reparametrize(model, layout, {"vo.0": values, "heads.0": kept})
    first = int(kept.encode.matrix()[0, :, 0].argmax())
    left = (shared[first] @ values.encode.matrix()[first]).repeat(r)[None]
    after = model.get_submodule(path)(left)
    assert relative_error(before, after) <= tolerance(torch.float64, layout.depth)
    assert (
        relative_error(before, after + values.offset.abs().mean()) > 1e-3
    )  # the control: an offset too many


# Runs and checkpoints


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("offsets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.chdir(root)
        save_tokens(root / "tokens.npy")
        yield


def recipe(*steps: dict[str, Any], **keys: Any) -> Recipe:
    calibrate = {"data": "tokens.npy", "dtype": "float32"}
    return Recipe.from_dict({"model": "m", "calibrate": calibrate, "steps": list(steps)} | keys)


def compressed(model: PreTrainedModel, *steps: dict[str, Any], **keys: Any) -> Outcome:
    return outcome(model, recipe(*steps, **keys), evaluate=False)


STEPS = {"mlp": [FLAP], "heads": [HEADS], "groups": [GROUPS], "all": [STAGES, FLAP, HEADS]}
STOCK = {("opt", "mlp"), ("phi", "mlp"), ("phi", "groups")}  # whose readers have biases


@pytest.mark.parametrize("order", ["oneshot", "sequential", "dense_target"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_what_is_saved_loads_with_the_same_logits(
    family: str, name: str, order: str, tmp_path: Path
) -> None:
    made = compressed(model_of(family), *STEPS[name], order=order)
    assert made.report["model"]["stock"] == ((family, name) in STOCK)
    why = made.report["model"]["why_not_stock"] or ""
    assert ("biases" in why) == (family == "llama" and name != "all")
    made.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert isinstance(loaded, InvarianceForCausalLM) != made.report["model"]["stock"]
    assert relative_error(logits(made.model, IDS), logits(loaded, IDS)) <= tolerance(
        torch.float32, 4
    )
    assert stored_numbers(tmp_path) == made.report["parameters"]["sliced"]["total"]
    biases = {
        n: p for n, p in loaded.named_parameters() if n.endswith(("down.bias", "down_proj.bias"))
    }
    if family == "llama" and name == "mlp":
        assert biases and all(p.abs().sum() > 0 for p in biases.values())
        with torch.no_grad():
            next(iter(biases.values())).zero_()
        assert relative_error(logits(made.model, IDS), logits(loaded, IDS)) > 1e-4  # the control


def test_a_bias_that_values_and_groups_both_need_is_counted_once() -> None:
    made = compressed(model_of("llama"), HEADS, GROUPS)
    assert (
        sum(p.numel() for p in made.model.parameters())
        == made.report["parameters"]["sliced"]["total"]
    )


def test_a_budget_counts_new_biases() -> None:
    model = model_of("llama")
    widths = {"mlp.0": 40, "mlp.1": 40}
    with_bias, without = (
        plan(recipe(FLAP | {"slice": s}), model.config) for s in ("bias_compensation", "truncate")
    )
    assert with_bias.parameters(widths).blocks == without.parameters(widths).blocks + 2 * 32
    whole = {"mlp.0": 64, "mlp.1": 64}
    assert with_bias.parameters(whole) == without.parameters(whole)  # nothing is gone then
    other = plan(recipe(FLAP), model_of("opt").config)
    assert other.parameters(widths) == plan(
        recipe(FLAP | {"slice": "truncate"}), model_of("opt").config
    ).parameters(widths)


@pytest.mark.parametrize("spaces", ["residual", "x.0.1"])
def test_bias_compensation_of_the_stream_is_refused_when_planned(spaces: str) -> None:
    step = {
        "spaces": spaces,
        "rotate": "pca",
        "select": {"uniform": {"keep": 0.5}},
        "slice": "bias_compensation",
    }
    with pytest.raises(InputError, match="'bias_compensation' is made for heads, mlp, vo spaces"):
        plan(recipe(step), model_of("llama").config)
