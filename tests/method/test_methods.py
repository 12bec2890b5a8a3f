"""One contract that every registered method keeps, on every kind of space that it admits."""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from invariance.methods import _fields
from invariance.methods.hadamard import hadamard, why_none
from torch import Tensor

from invariance import methods
from invariance.calibrate.moments import Moment, Moments
from invariance.calibrate.statistic import Statistic
from invariance.compress.planner import plan
from invariance.core.change import Basis, Change
from invariance.core.dense import in_group
from invariance.core.errors import InputError
from invariance.core.group import Group
from invariance.core.space import Space, haar
from invariance.method.interfaces import Rotator, Selector, Slicer, find, registry
from invariance.model.reparametrize import reparametrize
from invariance.model.verify import logits, relative_error
from invariance.recipe.recipe import Recipe, parse_recipe
from invariance.testing.methods import (
    KINDS,
    SPACES,
    bill,
    keeps_its_contract,
    leaves_the_logits,
    measures_what_it_needs,
    meets_its_budget,
    spectra,
    stored,
)
from invariance.testing.scenes import FAMILIES, IDS, ready, serves

METHODS = [(kind, name) for kind in ("rotate", "select", "slice") for name in registry(kind)]
OPTIONS: dict[
    str, list[dict[str, Any]]
] = {  # beside the defaults, where an option changes what is computed
    "pca": [{"of": "normed"}],
    "random_orthogonal": [{"seed": 3}, {"seed": 0}],
    "hadamard": [{"seed": 3}],
    "rope_pairs": [{"per": "layer"}, {"per": "model"}, {"metric": "fisher"}],
    "least_squares": [{"ridge": 0.01}],
    "permute": [{"metric": "fisher"}],
    "smooth": [{"strength": 0.0}],
    "ridge_leverage": [{"ridge": 0.1}],
    "obs": [{"metric": "fisher"}, {"rounds": 1}, {"rounds": 1000, "ridge": 0.1}],
    "output_aware": [{"of": "normed", "tau": 0.1}],
    "reader_weighted": [{"damping": 0.1}],
    "global_energy": [{"of": "absolute"}],
    "greedy": [{"of": "absolute", "step": 0.2}, {"loss": "measured"}],
    "dynamic_programming": [{"of": "absolute"}, {"curves": "measured", "points": 2}],
    "uniform": [{"keep": 0.7}, {"keep": 0.7, "multiple_of": 4}, {"width": 4}],
}


def variants(kind: str, name: str) -> list[Any]:
    return [find(kind, name)(**options) for options in ({}, *OPTIONS.get(name, []))]


def cases() -> list[Any]:
    """Every rotator on a space of every kind that takes it, of every family; on the first, with all variants of its options."""
    found = []
    for family, kind, name in itertools.product(FAMILIES, KINDS, registry("rotate")):
        space = next(s for s in ready(family).layout.spaces.values() if s.kind == kind)
        for rotator in variants("rotate", name)[: None if family == FAMILIES[0] else 1]:
            if serves(rotator, space):
                found.append(
                    pytest.param(family, rotator, space, id=f"{family}-{kind}-{rotator.spec()}")
                )
    return found


CASES = cases()
OF_EXPERTS = {"reap"}  # tests/compress/test_experts.py


def test_every_rotator_is_tried_and_each_kind_of_space_by_several() -> None:
    assert {case.values[1].name for case in CASES} == set(registry("rotate")) - OF_EXPERTS
    for kind in KINDS:
        assert len({case.values[1].name for case in CASES if case.values[2].kind == kind}) >= 2


@pytest.mark.parametrize(("family", "rotator", "space"), CASES)
def test_a_rotator_keeps_its_contract(family: str, rotator: Rotator, space: Space) -> None:
    keeps_its_contract(rotator, space, ready(family))


@pytest.mark.parametrize(("family", "rotator", "space"), CASES)
def test_a_rotator_measures_only_what_it_says_it_needs(
    family: str, rotator: Rotator, space: Space
) -> None:
    measures_what_it_needs(rotator, space, ready(family))


@pytest.mark.parametrize(
    "slicer", [s for n in registry("slice") for s in variants("slice", n)], ids=str
)
@pytest.mark.parametrize(("family", "rotator", "space"), CASES)
def test_at_full_width_every_slicer_leaves_the_logits(
    family: str, rotator: Rotator, space: Space, slicer: Slicer
) -> None:
    at = ready(family)
    change = slicer.cut(space, rotator.fit(space, at.moments), space.dim, at.moments)
    leaves_the_logits(slicer, space, change, at)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_direction_less_moves_the_logits(family: str, kind: str) -> None:
    at = ready(family)
    space = next(s for s in at.layout.spaces.values() if s.kind == kind)
    if space.normed:
        assert not any(space.fits(k) for k in range(space.dim))
        return
    identity = find("rotate", "identity")().fit(space, at.moments)
    model = copy.deepcopy(at.model)
    most = max(k for k in range(space.dim) if space.fits(k))
    change = find("slice", "truncate")().cut(space, identity, most, at.moments)
    reparametrize(model, at.layout, {space.name: change})
    assert relative_error(at.logits, logits(model, IDS)) > 1e-4


@pytest.mark.parametrize("name", ["random_orthogonal", "hadamard", "identity"])
def test_rotators_that_know_nothing_of_the_signal_need_none(name: str) -> None:
    assert find("rotate", name)().needs == frozenset()
    assert find("rotate", "pca")().needs  # the control


@pytest.mark.parametrize("name", ["random_orthogonal", "hadamard"])
def test_another_seed_or_space_gives_another_random_basis(name: str) -> None:
    first, second = (
        s for s in ready("llama").layout.spaces.values() if s.name in ("x.0.0", "x.0.1")
    )
    one, other = find("rotate", name)(seed=0), find("rotate", name)(seed=1)
    A = one.fit(first, Moments()).A.matrix()
    assert not torch.equal(A, other.fit(first, Moments()).A.matrix())
    assert not torch.equal(A, one.fit(second, Moments()).A.matrix())


@pytest.mark.parametrize("name", ["random_orthogonal", "hadamard"])
def test_the_recipes_seed_is_a_random_rotators_unless_it_has_its_own(name: str) -> None:
    def basis(recipe_seed: int, spec: Any) -> Tensor:
        text = {
            "model": "m",
            "seed": recipe_seed,
            "steps": [{"spaces": "residual", "rotate": spec}],
        }
        recipe = Recipe.from_dict(text)
        assert recipe.to_dict()["steps"][0]["rotate"] == spec  # planning leaves what is written
        (unit,) = plan(recipe, ready("llama").model.config).units
        return unit.rotate.fit(unit.space, Moments()).A.matrix()

    space = ready("llama").layout.spaces["x.0.0"]
    plain, own = find("rotate", name)(), {name: {"seed": 3}}
    assert torch.equal(
        plain.fit(space, Moments()).A.matrix(), basis(0, name)
    )  # outside of a recipe: 0
    assert not torch.equal(basis(0, name), basis(5, name))
    assert torch.equal(basis(5, name), basis(1, {name: {"seed": 5}}))
    assert torch.equal(basis(0, own), basis(5, own)) and not torch.equal(
        basis(0, own), basis(0, name)
    )
    assert torch.equal(
        basis(5, {name: {"seed": 0}}), basis(0, name)
    )  # 0 is a seed, not its absence


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_a_method_round_trips_through_a_recipe(kind: str, name: str) -> None:
    for method in variants(kind, name):
        step = {"spaces": "mlp", kind: method.spec()} | (
            {"select": "uniform"} if kind == "slice" else {}
        )
        text = {"model": "m", "calibrate": {"data": "d"}, "steps": [step]}
        if kind == "slice" or (kind == "select" and method.needs_budget):
            text["budget"] = {"parameters": 0.9}
        recipe = Recipe.from_dict(text)
        again = parse_recipe(recipe.to_yaml())
        assert getattr(again.steps[0], kind) == method
        assert type(getattr(again.steps[0], kind)) is type(method)


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_a_method_says_what_it_does_and_where_it_comes_from(kind: str, name: str) -> None:
    cls = find(kind, name)
    page = inspect.getdoc(cls) or ""
    assert cls.__doc__ and len(page.splitlines()[0]) > 20
    if kind != "select" or any(m.needs_spectra for m in variants(kind, name)):
        assert "Source:" in page or "baseline" in page


# --- Selectors.


def spenders() -> list[Selector]:
    """Every selector that spends a budget by what it knows of spectra."""
    deep = ("shortgpt",)  # which lets whole blocks go (test_depth.py)
    names = [n for n in registry("select") if n not in deep]
    return [s for n in names for s in variants("select", n) if s.needs_budget and not s.measures]


@pytest.mark.parametrize("selector", spenders(), ids=str)
@given(seed=st.integers(0, 999), share=st.floats(0.5, 1), multiple=st.sampled_from([1, 4]))
def test_a_selector_meets_its_budget_with_widths_that_are_allowed(
    selector: Selector, seed: int, share: float, multiple: int
) -> None:
    meets_its_budget(selector, seed, share, multiple)


def test_a_budget_that_nothing_meets_is_refused_with_the_nearest_that_can_be() -> None:
    least = stored({s: 1 for s in SPACES})
    bill(limit=least).check()
    with pytest.raises(
        InputError, match=rf"budget of 1,000 parameters cannot be met.*leave {least:,}"
    ):
        bill(limit=1000).check()


@given(keep=st.floats(0.01, 1), multiple=st.integers(1, 8))
def test_uniform_keeps_the_share_rounded_down(keep: float, multiple: int) -> None:
    allowed = {s: (*range(multiple, s.dim, multiple), s.dim) for s in SPACES}
    widths = find("select", "uniform")(keep=keep).allocate(
        spectra(0), replace(bill(), widths=allowed), None
    )
    for space, k in widths.items():
        assert 1 <= k <= space.dim and (k % multiple == 0 or k == space.dim)
        assert k <= keep * space.dim + 1e-6 or k == multiple
        assert k == space.dim or k + multiple > keep * space.dim - 1e-6


def test_global_energy_takes_from_the_space_that_holds_least() -> None:
    flat = {s: torch.ones(s.copies, s.dim, dtype=torch.float64) for s in SPACES}
    first, second, _ = SPACES
    flat[first][:, 8:] = 1e-9  # nearly all its energy lies in 8 of 48 directions
    selector = find("select", "global_energy")()
    widths = selector.allocate(flat, bill(4), stored({}) - 36 * 96)
    assert widths[first] <= 12 and widths[second] == second.dim


# --- Slicers.


def moment(seed: int, d: int, rank: int, copies: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(copies, d, rank, generator=g, dtype=torch.float64) * torch.rand(
        copies, d, 1, generator=g, dtype=torch.float64
    )
    return x @ x.mT / rank


def known(space: Space, C: Tensor) -> Moments:
    mean = Moment(C.diagonal(dim1=-2, dim2=-1).sqrt() / 2, 1)
    return Moments(
        {
            (space.name, s): Moment(C, 1)
            for s in (Statistic.RAW, Statistic.NORMED, Statistic.WEIGHTED)
        }
        | {(space.name, Statistic.MEAN): mean}
    )


def loss(change: Change, C: Tensor) -> Tensor:
    """E‖x − D Eᵀx‖² per copy."""
    P = torch.eye(C.shape[-1], dtype=C.dtype) - change.decode.matrix() @ change.encode.matrix().mT
    return (P @ C @ P.mT).diagonal(dim1=-2, dim2=-1).sum(-1)


draws = {
    "seed": st.integers(0, 9999),
    "d": st.integers(2, 12),
    "copies": st.integers(1, 3),
    "data": st.data(),
}


def drawn_basis(data: st.DataObject, space: Space, seed: int) -> Basis:
    group = data.draw(st.sampled_from([Group.PERMUTATION, Group.ORTHOGONAL, Group.INVERTIBLE]))
    A = Space(space.name, space.kind, space.dim, group, space.copies).element(seed).matrix()
    return Basis(A, torch.ones(space.copies, space.dim, dtype=torch.float64))


@pytest.mark.parametrize(
    "slicer", [s for n in registry("slice") for s in variants("slice", n)], ids=str
)
@given(**draws)
def test_a_slice_is_a_projector(
    slicer: Slicer, seed: int, d: int, copies: int, data: st.DataObject
) -> None:
    space = Space("vo.0", "vo", d, Group.INVERTIBLE, copies)
    C = moment(seed, d, 4 * d, copies)
    k = data.draw(st.integers(1, d), label="k")
    change = slicer.cut(space, drawn_basis(data, space, seed), k, known(space, C))
    assert change.encode.shape == change.decode.shape == (copies, d, k)
    P = change.encode.matrix() @ change.decode.matrix().mT
    ridge = (
        0.0 if k == d else vars(slicer).get("ridge", 0.0)
    )  # which shrinks what is decoded a little
    eye = torch.eye(k, dtype=P.dtype)
    shrunk = (change.decode.matrix().mT @ change.encode.matrix() - eye).abs().amax()
    cond = (
        torch.linalg.cond(change.encode.matrix().mT @ C @ change.encode.matrix()).amax()
        if ridge
        else 1.0
    )
    assert shrunk <= 4 * d * (ridge + 1e-14) * cond + 1e-9
    assert (P @ P - P).abs().amax() <= (shrunk + 1e-12) * d * P.abs().amax().clamp_min(1)
    assert torch.linalg.matrix_rank(P).eq(k).all()


@given(ridge=st.sampled_from([0.0, 1e-6]), **draws)
def test_least_squares_never_reconstructs_worse_than_truncation(
    ridge: float, seed: int, d: int, copies: int, data: st.DataObject
) -> None:
    space = Space("vo.0", "vo", d, Group.INVERTIBLE, copies)
    rank = data.draw(st.integers(1, 2 * d), label="rank")
    C = moment(seed, d, rank, copies)
    basis = drawn_basis(data, space, seed)
    k = data.draw(st.integers(1, d), label="k")
    refit = find("slice", "least_squares")(ridge=ridge).cut(space, basis, k, known(space, C))
    plain = find("slice", "truncate")().cut(space, basis, k, known(space, C))
    size = C.diagonal(dim1=-2, dim2=-1).sum(-1)
    # The ridge costs at most λ‖D‖², with D any other decoder; truncation's D bounds it.
    scale = (
        (refit.encode.matrix().mT @ C @ refit.encode.matrix()).diagonal(dim1=-2, dim2=-1).mean(-1)
    )
    slack = max(ridge, 1e-14) * scale * plain.decode.matrix().square().sum((-2, -1)) + 1e-10 * size
    assert bool((loss(refit, C) <= loss(plain, C) + slack).all())


def test_least_squares_reconstructs_much_better_where_channels_are_correlated() -> None:
    space = Space("mlp.0", "mlp", 8, Group.MONOMIAL)
    C = moment(5, 8, 3)
    basis = find("rotate", "identity")().fit(space, Moments())
    refit, plain = (
        find("slice", n)().cut(space, basis, 4, known(space, C))
        for n in ("least_squares", "truncate")
    )
    assert loss(refit, C) < 0.01 * loss(plain, C)


# --- Hadamard.

REFUSED = [116, 156, 172, 188, 232, 236, 260]
ORDERS = [1, 2, *(d for d in range(4, 261, 4) if d not in REFUSED), 576]
FIELDS = [(3, 1), (7, 1), (3, 2), (5, 2), (3, 3), (7, 2), (3, 4)]


def is_hadamard(H: Tensor) -> bool:
    d = len(H)
    signs = torch.equal(H.abs(), torch.ones(d, d, dtype=torch.float64))
    return signs and torch.equal(H @ H.mT, d * torch.eye(d, dtype=torch.float64))


@pytest.mark.parametrize("d", ORDERS)
def test_hadamard_matrices_have_entries_of_one_and_orthogonal_rows(d: int) -> None:
    H = hadamard(d)
    assert H.shape == (d, d) and is_hadamard(H)
    if d > 1:
        H[0, 0] *= -1  # the control: one sign is wrong
        assert not is_hadamard(H)


def test_integers_modulo_a_prime_power_give_no_hadamard_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control of GF(p^m): Z/p^m, which is no field, in its place."""
    assert all(is_hadamard(hadamard(d)) for d in (28, 52, 100))
    squares = {q: {x * x % q for x in range(q)} for q in (25, 27, 49)}

    def character(p: int, m: int) -> Tensor:
        q = p**m
        value = torch.tensor(
            [0.0] + [1.0 if x in squares[q] else -1.0 for x in range(1, q)]
        ).double()
        return value[(torch.arange(q)[:, None] - torch.arange(q)) % q]

    monkeypatch.setattr(methods.hadamard, "character", character)
    assert not any(is_hadamard(hadamard(d)) for d in (28, 52, 100))


@pytest.mark.parametrize(("p", "m"), FIELDS)
def test_the_powers_of_one_element_are_the_field_and_its_squares_half_of_it(p: int, m: int) -> None:
    q, elements = p**m, _fields.powers(p, m)
    assert len(set(elements)) == q - 1 and all(any(e) for e in elements)
    S = _fields.character(p, m)
    assert S.sum(1).eq(0).all() and S.abs().sum(1).eq(q - 1).all()  # as many squares as others
    assert torch.equal(S.mT, S if q % 4 == 1 else -S)
    number = [sum(a * p**i for i, a in enumerate(e)) for e in elements]
    assert all(S[n, 0] == (-1) ** k for k, n in enumerate(number))


def test_prime_powers_are_told_from_other_numbers() -> None:
    known = {
        p**m: (p, m)
        for p in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)
        for m in range(1, 6)
    }
    assert {q: f for q in range(49) if (f := _fields.prime_power(q))} == {
        q: known[q] for q in sorted(known) if q < 49
    }
    assert all(_fields.prime_power(q) == f for q, f in known.items())
    with pytest.raises(ValueError, match="6 is not prime"):
        _fields.powers(6, 1)


@pytest.mark.parametrize("d", [3, 5, 6, 10, 14, 27, 98])
def test_an_order_that_cannot_be_is_refused_with_the_reason(d: int) -> None:
    assert "must be 1, 2 or a multiple of 4" in (why_none(d) or "")
    with pytest.raises(ValueError, match=f"order {d}"):
        hadamard(d)


def test_an_order_that_no_construction_reaches_is_called_so() -> None:
    assert [d for d in range(4, 261, 4) if why_none(d)] == REFUSED
    assert all("no construction known here" in (why_none(d) or "") for d in REFUSED)
    assert all(why_none(d) is None for d in ORDERS)
    page = inspect.getdoc(find("rotate", "hadamard")) or ""
    assert [
        int(n) for n in re.findall(r"\d+", page.partition("these are")[2].partition(".")[0])
    ] == REFUSED


def test_haar_matrices_are_orthogonal_and_not_their_group_neighbours() -> None:
    A = haar(6, torch.Generator().manual_seed(0))[None]
    assert in_group(Group.ORTHOGONAL, A) and not in_group(Group.SIGNED_PERMUTATION, A)
