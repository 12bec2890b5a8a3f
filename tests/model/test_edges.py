"""Matrices as two factors with a space between them: exact, counted truly, saved, and cut by their best low rank."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import model_of, save_tokens, stored_numbers
from hypothesis import given
from hypothesis import strategies as st
from sliced import taken
from tiny import (
    canonical_copy,
    cut,
    elements,
    fewer,
    rotations,
    seeds,
    stored,
    subset,
    tiny,
    tiny_models,
    tokens,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from invariance.calibrate.enter import enter
from invariance.calibrate.moments import Moment, Moments, reader_moment
from invariance.calibrate.statistic import Statistic
from invariance.compress.pipeline import slice_model
from invariance.compress.plan import Plan
from invariance.compress.planner import plan
from invariance.core.change import Change
from invariance.core.errors import InputError
from invariance.core.group import Group
from invariance.io.checkpoint import layout_of_config, wrap
from invariance.io.data import Tokens, load_tokens
from invariance.method.interfaces import find
from invariance.model import verify
from invariance.model.canonical import canonicalize, layout_of
from invariance.model.folding import assign, join
from invariance.model.labels import label
from invariance.model.layout import Layout
from invariance.model.modules import Factored, factors
from invariance.model.reparametrize import reparametrize
from invariance.model.verify import certify, logits, relative_error, tolerance
from invariance.model.working import Whole
from invariance.recipe.recipe import Recipe
from invariance.run.outcome import outcome

MOVED = 1e-3
SVD = {"spaces": "edge", "rotate": "weight_svd", "select": {"uniform": {"keep": 0.4}}}
NAMES = ("q", "k", "v", "out", "gate", "up", "down")


def edges(model: PreTrainedModel) -> list[str]:
    return list(layout_of(model.config).matrices)


def folded(model: PreTrainedModel, split: list[str]) -> tuple[PreTrainedModel, Layout]:
    twin, _ = canonical_copy(model, fold=True, tie="untie")
    return twin, canonicalize(twin, fold=True, split=split)


def matrix(model: PreTrainedModel, path: str) -> Tensor:
    """The whole matrix of a linear layer, split or not."""
    product: Tensor | None = None
    for factor in factors(model.get_submodule(path)):  # type: ignore[arg-type]
        W = factor.weight.double()
        product = W if product is None else W @ product
    assert product is not None
    return product


def recipe(*steps: Mapping[str, Any], **keys: Any) -> Recipe:
    data = {"data": "tokens.npy", "dtype": "float32"}
    return Recipe.from_dict({"model": "m", "calibrate": data, "steps": list(steps), **keys})


@pytest.fixture
def calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokens:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))
    save_tokens(Path("tokens.npy"))
    return load_tokens("tokens.npy", None, vocab_size=41)


# The theorem


@given(model=tiny_models(), fold=st.booleans(), data=st.data())
def test_splitting_any_matrices_before_or_after_folding_leaves_the_logits(model, fold, data):
    split = subset(data, edges(model), 1)
    ids = tokens(data.draw(seeds, label="tokens"))
    before = logits(verify.exact_copy(model), ids)
    twin, _ = canonical_copy(model, fold=False, tie="untie")
    layout = canonicalize(twin, fold=fold, split=split)
    assert (
        set(layout.select(["edge"]))
        == set(split)
        == {n for n in layout.spaces if n.startswith("edge")}
    )
    plain = canonicalize(exact := verify.exact_copy(model), fold=fold)
    assert layout.parameters({}) == plain.parameters({}) and plain.parameters({}).total == stored(
        exact
    )
    for edge in split:  # one of the factors is the identity, but for a gain
        space = layout.spaces[edge]
        assert space.group is Group.INVERTIBLE and space.dim == min(
            layout.shapes[f"{label(verify.exact_copy(model)).matrices[edge]}.{part}.weight"][i]
            for part, i in (("first", 1), ("second", 0))
        )
    assert relative_error(before, logits(twin, ids)) <= tolerance(torch.float64, layout.depth)
    canonicalize(twin, fold=True)  # gains and biases go through both factors
    assert relative_error(before, logits(twin, ids)) <= tolerance(torch.float64, layout.depth)


@given(model=tiny_models(), data=st.data())
def test_any_elements_of_edges_beside_all_other_spaces_leave_the_logits(model, data):
    ids = tokens(data.draw(seeds, label="tokens"))
    split = subset(data, edges(model), 1)
    changed, layout = folded(model, split)
    names = [*split, *subset(data, [n for n in layout.spaces if n not in split])]
    bases = elements(layout, names, data.draw(seeds, label="seed"))
    before = logits(verify.exact_copy(model), ids)
    half = copy.deepcopy(changed)
    reparametrize(changed, layout, rotations(bases))
    assert relative_error(before, logits(changed, ids)) <= tolerance(torch.float64, layout.depth)
    reparametrize(half, layout, verify.half(layout, dict.fromkeys(split), 1))
    assert relative_error(before, logits(half, ids)) > MOVED


@fewer
@given(model=tiny_models(), seed=seeds)
def test_the_certificate_splits_what_has_a_basis_and_sees_a_matrix_that_has_none(model, seed):
    _, layout = folded(model, edges(model))
    bases = elements(layout, layout.spaces, seed)
    found = certify(model, bases, tokens(seed), fold=True)
    assert found.passed and found.spaces == len(layout.spaces)
    name = f"edge.0.{'down' if seed % 2 else 'k'}"
    singular = bases[name].matrix().clone()
    singular[..., -1] = 0
    assert layout.spaces[name].contains(bases[name]) and not layout.spaces[name].contains(singular)


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
@pytest.mark.parametrize("name", NAMES)
def test_a_second_factor_changed_by_the_element_in_place_of_its_inverse_transpose(family, name):
    """A mutation: as if the edge were of an orthogonal group."""
    model = tiny(family)
    if f"edge.0.{name}" not in edges(model):
        return
    split, layout = folded(model, [f"edge.0.{name}"])
    A = layout.spaces[f"edge.0.{name}"].element(0)
    before, bound = (
        logits(verify.exact_copy(model), tokens()),
        tolerance(torch.float64, layout.depth),
    )
    for change, right in ((Change.rotation(A), True), (Change(A, A), False)):
        twin = copy.deepcopy(split)
        reparametrize(twin, layout, {f"edge.0.{name}": change})
        error = relative_error(before, logits(twin, tokens()))
        assert error <= bound if right else error > 1e5 * bound


@pytest.mark.parametrize("family", ["opt", "phi", "qwen2"])
def test_a_bias_that_lies_on_the_first_factor_is_another_function(family):
    model = tiny(family)
    split, layout = folded(model, ["edge.1.v"])
    before, bound = (
        logits(verify.exact_copy(model), tokens()),
        tolerance(torch.float64, layout.depth),
    )
    pair = split.get_submodule(
        layout.edges[-1].stage if family == "phi" else layout.edges[-2].stage
    ).attention.v
    assert isinstance(pair, Factored) and pair.first.bias is None and pair.second.bias is not None
    reparametrize(split, layout, rotations(elements(layout, ["edge.1.v"], 0)))
    assert relative_error(before, logits(split, tokens())) <= bound
    pair.second.bias = None
    assert relative_error(before, logits(split, tokens())) > 1e5 * bound


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_a_cut_edge_is_its_matrix_with_a_projector_inside(family):
    model = tiny(family)
    split, layout = folded(model, edges(model))
    dense, _ = folded(model, [])
    kept = {n: 1 + int(layout.spaces[n].share(0.6)) for n in edges(model)}
    changes = {n: cut(c, kept[n]) for n, c in rotations(elements(layout, edges(model), 3)).items()}
    paths = layout_of(model.config).matrices
    whole = {
        n: [f.weight.clone() for f in factors(split.get_submodule(p))] for n, p in paths.items()
    }
    reparametrize(split, layout, changes)
    for name, (first, second) in whole.items():
        P = changes[name].decode.matrix()[0] @ changes[name].encode.matrix()[0].mT
        assign(dense, f"{paths[name]}.weight", second @ P @ first)
    bound = tolerance(torch.float64, layout.depth)
    assert relative_error(logits(dense, tokens()), logits(split, tokens())) <= bound
    assert (
        relative_error(logits(verify.exact_copy(model), tokens()), logits(split, tokens())) > MOVED
    )


# What it stores


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_a_cut_edge_stores_its_width_times_both_sides(family):
    model = tiny(family)
    twin, layout = folded(model, ["edge.0.up", "edge.1.k"])
    plain = layout_of(model.config, fold=True)
    for name, k in (("edge.0.up", 5), ("edge.1.k", 3)):
        rows, columns = plain.shapes[f"{plain.matrices[name]}.weight"]
        more = layout.parameters({name: k}).total - layout.parameters({}).total
        assert more == k * (rows + columns) - rows * columns < 0
    assert layout.parameters({}).total == plain.parameters({}).total
    assert layout.flops({}) == plain.flops({})
    kept = {"edge.0.up": 3, "edge.1.k": 2, "x.0.0": 9, "vo.1": 2, "mlp.0": 7}
    reparametrize(
        twin, layout, {n: cut(c, kept[n]) for n, c in rotations(elements(layout, kept, 0)).items()}
    )
    segments = {"x.0.0": 1}
    assert (
        layout.parameters(kept, segments).total == stored(twin) == label(twin).parameters({}).total
    )
    assert layout.flops(kept, segments) == label(twin).flops({})
    assert layout.kv_entries(kept) == label(twin).kv_entries({}) == plain.kv_entries({"vo.1": 2})


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
@pytest.mark.parametrize("share", [0.9, 0.8])
def test_a_budget_over_ranks_is_spent_truly(family, share, calibration):
    model = model_of(family)
    step = SVD | {"select": "uniform"}
    made = outcome(model, recipe(step, budget={"parameters": share}), evaluate=False)
    total = stored(made.model)
    assert total == made.report["parameters"]["sliced"]["total"] <= share * stored(model)
    assert total > (share - 0.06) * stored(model)


# Plans


def planned(*steps: Mapping[str, Any], family: str = "llama", **keys: Any) -> Plan:
    return plan(recipe(*steps, **keys), tiny(family).config)


def test_patterns_split_what_they_name_and_nothing_else():
    layout = layout_of(tiny("llama").config)
    assert not layout.select(["edge", "edge.*"]) and not layout.splits(["*", "mlp", "e*"])
    assert list(layout.matrices) == [f"edge.{i}.{n}" for i in range(2) for n in NAMES]
    assert layout.matrices["edge.1.down"] == "model.layers.1.stages.1.mlp.down"
    assert layout.splits(["edge"]) == set(layout.matrices)
    assert layout.splits(["edge.*.down", "edge.0.q"]) == {"edge.0.down", "edge.1.down", "edge.0.q"}
    assert list(layout_of(tiny("opt").config).matrices) == [
        f"edge.{i}.{n}" for i in range(2) for n in NAMES if n != "gate"
    ]
    both = planned(SVD | {"spaces": "edge.*.down"}, {"spaces": "mlp", "rotate": "permute"}).layout
    assert both.select(["edge"]) == ["edge.0.down", "edge.1.down"]
    assert both.matrices.keys() == layout.matrices.keys() - both.spaces.keys()
    assert label(canonical_copy(tiny("llama"), fold=False, tie="untie")[0]).select(["edge"]) == []


@pytest.mark.parametrize(
    ("step", "keys", "message"),
    [
        ({"spaces": "edge.7.q"}, {}, "no space of this model is called 'edge.7.q'"),
        ({"spaces": "edge.0.gate_proj"}, {}, "no space of this model is called"),
        (
            {"spaces": "mlp"},
            {},
            "rotator 'weight_svd' makes bases of the group 'invertible'; space 'mlp.0' admits",
        ),
        ({"spaces": "vo"}, {}, "rotator 'weight_svd' is made for edge spaces, and 'vo.0' is none"),
        (
            {"rotate": "head_svd"},
            {},
            "rotator 'head_svd' is made for vo spaces, and 'edge.0.q' is none",
        ),
        (
            {},
            {"order": "dense_target"},
            "refits whole matrices, and space 'edge.0.q' lies inside one",
        ),
        ({"widths": {"min": 0}}, {}, "no branch vanishes with space 'edge.0.q'"),
    ],
)
def test_what_cannot_be_done_to_edges_is_refused(step, keys, message):
    with pytest.raises(InputError, match=message):
        planned(SVD | step, **keys)


def test_an_edge_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"'edge.0.dwn' \(did you mean|edge.0.down"):
        canonicalize(tiny("llama"), fold=False, split=["edge.0.dwn"])


@given(model=tiny_models(), data=st.data())
def test_factors_that_store_no_less_than_their_matrix_become_one_again(model, data):
    split, layout = folded(model, edges(model))
    bases = elements(layout, edges(model), data.draw(seeds, label="seed"))
    ranks = {n: data.draw(st.integers(1, layout.spaces[n].dim), label=n) for n in bases}
    reparametrize(split, layout, {n: cut(c, ranks[n]) for n, c in rotations(bases).items()})
    before = logits(split, tokens())
    join(split)
    now = label(split)
    smaller = {
        n
        for n, k in ranks.items()
        if k * layout.spaces[n].dim < layout.spaces[n].dim * layout.spaces[n].even
    }
    assert set(layout.factored(ranks)) == set(now.select(["edge"])) == smaller
    assert all(
        layout.spaces[n].fits(ranks[n]) == (n in smaller or ranks[n] == layout.spaces[n].dim)
        for n in ranks
    )
    assert now.parameters({}).total == layout.parameters(ranks).total == stored(split)
    assert relative_error(before, logits(split, tokens())) <= tolerance(torch.float64, layout.depth)


def test_fractions_of_a_matrix_are_of_what_it_stores():
    space = folded(tiny("llama"), ["edge.0.up"])[1].spaces["edge.0.up"]
    rows, columns = layout_of(tiny("llama").config).shapes["model.layers.0.stages.1.mlp.up.weight"]
    for fraction in (0.1, 0.5, 0.99):
        k = space.share(fraction)
        assert k * (rows + columns) == pytest.approx(fraction * rows * columns)
        assert space.fraction(k) == pytest.approx(fraction)
    assert space.share(1) == space.dim and space.fraction(space.dim) == 1


def test_a_matrix_kept_whole_leaves_an_ordinary_checkpoint(calibration):
    """Protected, or wide enough: nothing of the split is left."""
    made = outcome(
        model_of("llama"), recipe(SVD | {"widths": {"protect": {"first": 2}}}), evaluate=False
    )
    assert made.report["model"]["stock"] and stored(made.model) == stored(model_of("llama"))
    half = outcome(
        model_of("llama"), recipe(SVD | {"widths": {"protect": {"first": 1}}}), evaluate=False
    )
    pairs = [n for n, m in half.model.named_modules() if isinstance(m, Factored)]
    assert len(pairs) == 7 and all(".1." in n for n in pairs)
    assert (
        stored(half.model)
        == half.report["parameters"]["sliced"]["total"]
        < stored(model_of("llama"))
    )


def test_a_rank_that_saves_nothing_beside_other_cuts_is_not_taken(calibration):
    """Two factors of 19 store less than a matrix of 64 × 32, and no less than one of 40 × 32."""
    mlp = {"spaces": "mlp", "rotate": "permute", "select": {"uniform": {"width": 40}}}
    edge = SVD | {"spaces": "edge.*.up", "select": {"uniform": {"width": 19}}}
    alone, both, rank = (
        outcome(model_of("llama"), recipe(*s), evaluate=False) for s in ([mlp], [edge, mlp], [edge])
    )
    assert rank.report["widths"]["edge.0.up"] == 19 and both.report["widths"]["edge.0.up"] == 32
    assert both.report["model"]["stock"] and stored(both.model) == stored(alone.model)
    ids = calibration.ids[:2]
    assert relative_error(logits(alone.model, ids), logits(both.model, ids)) <= tolerance(
        torch.float32, 4
    )


# Runs and checkpoints


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
@pytest.mark.parametrize("order", ["oneshot", "sequential"])
def test_a_run_saves_and_loads_what_it_made(family, order, tmp_path, calibration):
    model = model_of(family)
    residual = {"spaces": "residual", "rotate": "pca", "select": {"uniform": {"width": 30}}}
    heads = {"spaces": "vo", "rotate": "head_svd", "select": {"uniform": {"width": 6}}}
    made = outcome(model, recipe(SVD, residual, heads, order=order), evaluate=False)
    assert "stored as two factors" in made.report["model"]["why_not_stock"]
    assert made.report["exactness"]["passed"]
    made.model.save_pretrained(tmp_path / "made")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    ids = calibration.ids[:2]
    assert torch.equal(logits(made.model, ids), logits(loaded, ids))
    assert stored_numbers(tmp_path / "made") == made.report["parameters"]["sliced"]["total"]
    found = layout_of_config(loaded.config)
    assert {n: s.dim for n, s in found.spaces.items()} == made.report["widths"]
    assert found.parameters({}).total == made.report["parameters"]["sliced"]["total"]
    bases = verify.random_bases(verify.canonical_layout(loaded))
    assert any(n.startswith("edge") for n in bases)
    assert certify(loaded, bases, ids, fold=True).passed


def test_edges_of_a_branch_that_goes_go_with_it(tmp_path):
    model = tiny("llama")
    twin, layout = folded(model, ["edge.0.down", "edge.1.q", "edge.1.down"])
    twin.float()
    reparametrize(twin, layout, {"mlp.0": Change.empty(layout.spaces["mlp.0"], 0)})
    assert label(twin).select(["edge"]) == ["edge.1.q", "edge.1.down"]
    join(twin)
    assert layout.parameters({"mlp.0": 0}).total == stored(twin)
    wrapped = wrap(twin, layout, model.config, "untie")
    wrapped.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(wrapped, tokens()), logits(loaded, tokens()))


def test_readers_means_go_into_a_first_factors_bias_and_are_counted(calibration, tmp_path):
    flap = {
        "spaces": "mlp",
        "rotate": "fluctuation",
        "select": {"uniform": {"keep": 0.7}},
        "slice": "bias_compensation",
    }
    edge = SVD | {"spaces": "edge.*.down", "select": {"uniform": {"width": 9}}}
    for steps in ((flap, edge), (edge, flap)):
        made = outcome(model_of("llama"), recipe(*steps), evaluate=False)
        assert stored(made.model) == made.report["parameters"]["sliced"]["total"]
        pairs = [m for m in made.model.modules() if isinstance(m, Factored)]
        assert [p.first.bias.shape for p in pairs] == [(9,), (9,)]
        made.model.save_pretrained(tmp_path / "made")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
        assert torch.equal(logits(made.model, calibration.ids), logits(loaded, calibration.ids))


# What is measured, and the best low rank


def inputs(model: PreTrainedModel, paths: Mapping[str, str], ids: Tensor) -> dict[str, Tensor]:
    """What the matrices of a model read, a row a token."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(p).register_forward_pre_hook(
            lambda _m, a, n=n: found.update({n: a[0].flatten(0, 1)})
        )
        for n, p in paths.items()
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_an_edge_is_measured_where_its_first_factor_writes_and_weighs_what_its_second_reads(family):
    model = tiny(family)
    names = edges(model)
    twin, layout = folded(model, names)
    paths = layout_of(model.config).matrices
    ids = tokens(batch=4)
    read = inputs(twin, paths, ids)
    parts = Whole(twin, layout)
    batches = enter(parts, [(ids, torch.ones_like(ids, dtype=torch.bool))], torch.float64)
    found = taken(parts, batches, {n: frozenset({Statistic.RAW}) for n in names}, torch.float64)
    plain, whole = folded(model, [])
    for name in names:
        first, second = (f.weight for f in factors(twin.get_submodule(paths[name])))
        y = read[name] @ first.mT
        C = found.second(layout.spaces[name])[0]
        assert relative_error(y.mT @ y / len(y), C) < 1e-9
        G = reader_moment(parts, layout.spaces[name]).mean[0]
        assert relative_error(second.mT @ second, G) < 1e-9
    for (
        name,
        space,
    ) in (
        whole.spaces.items()
    ):  # of the others, what readers weigh does not hang on how they are stored
        one, other = (
            reader_moment(Whole(*at), space).mean for at in ((plain, whole), (twin, layout))
        )
        assert relative_error(one, other) < 1e-9, name
        assert whole.written_behind(name) == layout.written_behind(name)


@pytest.mark.parametrize("name", NAMES)
def test_whitened_singular_directions_are_the_best_of_their_rank(name):
    model = tiny("llama")
    space = f"edge.1.{name}"
    twin, layout = folded(model, [space])
    path = layout_of(model.config).matrices[space]
    x = inputs(twin, {space: path}, tokens(batch=12))[space]
    W, k = matrix(twin, path), 3
    y = x @ factors(twin.get_submodule(path))[0].weight.double().mT
    G = reader_moment(Whole(twin, layout), layout.spaces[space])

    def loss(C: Tensor) -> tuple[float, float]:
        moments = Moments(
            {(space, Statistic.RAW): Moment(C[None], 1), (space, Statistic.READERS): G}
        )
        basis = find("rotate", "weight_svd")().fit(layout.spaces[space], moments)
        change = find("slice", "truncate")().cut(layout.spaces[space], basis, k, moments)
        cutted = copy.deepcopy(twin)
        reparametrize(cutted, layout, {space: change})
        return ((x @ (W - matrix(cutted, path)).mT).square().sum() / len(x)).item(), basis.energy[
            0, k:
        ].sum().item()

    found, predicted = loss(y.mT @ y / len(y))
    best = torch.linalg.svdvals(x @ W.mT)[k:].square().sum().item() / len(
        x
    )  # Eckart and Young's, of the outputs
    assert found == pytest.approx(best, rel=1e-6) == pytest.approx(predicted, rel=1e-6)
    unwhitened, _ = loss(torch.eye(len(y.mT), dtype=torch.float64))
    assert unwhitened > 1.01 * best


def test_the_paper_by_hand(calibration):
    """SVD-LLM as published: the SVD of W S with S Sᵀ = Σ x xᵀ by Cholesky, its first k terms, times S⁻¹."""
    model = model_of("llama")
    made = slice_model(model, plan(recipe(SVD), model.config), calibration)
    dense, layout = canonical_copy(model, fold=False, tie="untie")
    read = inputs(dense, layout.matrices, calibration.ids)
    for name, path in layout.matrices.items():
        W, x = dense.get_submodule(path).weight, read[name]
        S = torch.linalg.cholesky(x.mT @ x + 1e-9 * (x.mT @ x).trace() * torch.eye(x.shape[1]))
        U, sigma, Vt = torch.linalg.svd(W @ S)
        k = made.widths[name]
        theirs = (
            U[:, :k] * sigma[:k] @ torch.linalg.solve_triangular(S, Vt[:k], upper=False, left=False)
        )
        ours = matrix(made.model, path)
        assert relative_error(x @ theirs.mT, x @ ours.mT) < 1e-2
        assert relative_error(x @ W.mT, x @ ours.mT) > 1e-2
