"""The contracts of methods: what a recipe supposes of whatever it names, tried on tiny models of several families."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..calibrate.moments import Moments
from ..core.change import Basis, Change
from ..core.dense import in_group
from ..core.errors import InvarianceError
from ..core.group import Group
from ..core.kind import Kind
from ..core.space import Space
from ..method import checked
from ..method.budget import Bill
from ..method.interfaces import BASING, Joint, Method, Rotator, Selector, Slicer, find, registry
from ..model.reparametrize import reparametrize
from ..model.verify import logits, relative_error, tolerance
from ..recipe.recipe import Recipe, parse_recipe
from .scenes import FAMILIES, IDS, Ready, ready, scene, serves

KINDS = ("residual", "mlp", "vo", "qk", "heads", "edge")
ELSEWHERE = (Kind.EDGE, Kind.EXPERTS)  # what the models of these tests have not
PRICES = {"mlp": 96, "vo": 256}


def check_method(
    method: Method | type[Method] | str,
    *,
    options: Mapping[str, Any] | None = None,
    families: Iterable[str] = FAMILIES,
) -> None:
    """Try the contract of a rotator, joint method, selector or slicer: an object, a class with ``options``, or a name.

    All of them: a manual page, options that a recipe can hold, the same result twice, nothing that requires gradients. A
    rotator: bases of the right shape in its group, energies that are none below 0 and fall, no statistic read that it does
    not name, logits unchanged, on a space of every kind that it serves. A joint method: the same of all spaces at once, or
    changes to the widths asked for. A slicer: exact at full width, whatever basis comes; changes of the right shape below;
    with ``prefix``, a narrower one part of a wider. A selector: allowed widths, within the budget.

    Raises AssertionError that names the method and what does not hold.
    """
    made = _made(method, options or {})
    _says_what_it_is(made)
    _round_trips(made)
    if isinstance(made, Rotator):
        _on_each_space(made, families)
    elif isinstance(made, Joint):
        serves_a_scene(made)
    elif isinstance(made, Slicer):
        for family in families:
            for kind in KINDS:
                space = ready(family).space(kind)
                if kind in made.kinds and not (made.mixes and space.rotary) and not space.normed:
                    identity = find("rotate", "identity")().fit(space, Moments())
                    slices_well(made, ready(family), space, identity)
    elif isinstance(made, Selector):
        if not made.measures and not made.depth:
            for seed, share, multiple in ((0, 0.9, 1), (1, 0.7, 4), (2, 0.55, 1), (3, 1.0, 4)):
                meets_its_budget(made, seed, share, multiple)
    else:
        raise AssertionError(f"{_named(made)}: no contract is known of the kind '{made.kind}'")


def keeps_its_contract(rotator: Rotator, space: Space, at: Ready) -> None:
    """One basis: its shape, group, energies; the same twice."""
    basis = _faultless(rotator, lambda: checked.fitted(rotator, space, copy.deepcopy(at.moments)))
    _of_basis(rotator, space, basis)
    again = type(rotator)(**_options(rotator)).fit(space, copy.deepcopy(at.moments))
    _hold(rotator, space, _same(basis, again), "gave another basis the second time")


def measures_what_it_needs(rotator: Rotator, space: Space, at: Ready) -> None:
    """``needs`` names every statistic that a rotator reads, and no other."""
    needs = {(space.name, s.on(space)) for s in rotator.needs}
    only = Moments({k: m for k, m in at.moments.known.items() if k in needs}, at.layout)
    try:
        found = rotator.fit(space, only)
    except KeyError as e:
        raise AssertionError(
            f"{_named(rotator)}, space '{space.name}': reads {e}, which `needs` does not name"
        ) from e
    whole = rotator.fit(space, copy.deepcopy(at.moments))
    _hold(rotator, space, _same(found, whole), "hangs on moments that `needs` does not name")
    for key in needs:
        less = Moments({k: m for k, m in only.known.items() if k != key}, at.layout)
        try:
            rotator.fit(space, less)
        except KeyError:
            continue
        _hold(rotator, space, False, f"names '{key[1].value}' in `needs` and does not read it")


def leaves_the_logits(method: Method, space: Space, change: Change, at: Ready) -> None:
    """A change at full width is exact."""
    model = copy.deepcopy(at.model)
    reparametrize(model, at.layout, {space.name: change})
    error, bound = (
        relative_error(at.logits, logits(model, IDS)),
        tolerance(torch.float64, at.layout.depth),
    )
    _hold(
        method,
        space,
        error <= bound,
        f"moves the logits by {error:.1e}, where rounding explains {bound:.1e}",
    )


def slices_well(slicer: Slicer, at: Ready, space: Space, basis: Basis) -> None:
    """Exact at full width; below it a change of the right shape; a prefix where it says so."""
    whole = _faultless(
        slicer, lambda: checked.cut(slicer, space, basis, space.dim, copy.deepcopy(at.moments))
    )
    leaves_the_logits(slicer, space, whole, at)
    cuts = {
        k: _faultless(
            slicer, lambda k=k: checked.cut(slicer, space, basis, k, copy.deepcopy(at.moments))
        )  # type: ignore[misc]
        for k in range(1, space.dim)
        if space.fits(k) and k % 3 == space.dim % 3
    }
    for k, change in cuts.items():
        model = copy.deepcopy(at.model)
        reparametrize(model, at.layout, {space.name: change})
        _hold(slicer, space, bool(torch.isfinite(logits(model, IDS)).all()), f"breaks at width {k}")
        if slicer.prefix and not space.rotary:
            part = torch.arange(k)
            narrower = (change.encode, change.decode)
            wider = (whole.encode.columns(part), whole.decode.columns(part))
            same = all(
                torch.equal(a.matrix(), b.matrix()) for a, b in zip(narrower, wider, strict=True)
            )
            _hold(slicer, space, same, f"says `prefix`, and width {k} is no part of {space.dim}")


def serves_a_scene(joint: Joint) -> None:
    """What a joint method gives all spaces that it serves, at widths below theirs; the same twice."""
    kinds = [
        kind.value
        for kind in Kind
        if kind not in ELSEWHERE and serves(joint, ready("llama").space(kind.value))
    ]
    assert kinds, f"{_named(joint)}: serves no space; see its `produces` and `kinds`"
    here = scene(kinds)
    given = _faultless(joint, lambda: checked.jointly(joint, here))
    again = type(joint)(**_options(joint)).fit(scene(kinds))
    for name, one in given.items():
        other = again[name]
        if isinstance(one, Basis):
            _of_basis(joint, here.spaces[name], one)
            _hold(joint, here.spaces[name], _same(one, other), "gave another basis the second time")
        else:
            assert isinstance(other, Change)
            same = torch.equal(one.encode.matrix(), other.encode.matrix())
            _hold(joint, here.spaces[name], same, "gave another change the second time")


def meets_its_budget(selector: Selector, seed: int, share: float, multiple: int) -> None:
    """Widths that are allowed, within the budget, the same twice; whole where all is allowed."""
    cost, budget = bill(multiple), int(share * stored({}))
    asked = budget if selector.needs_budget else None
    widths = _faultless(selector, lambda: selector.allocate(spectra(seed), cost, asked))
    where = f"{_named(selector)}, at {share:.0%} in multiples of {multiple}"
    assert set(widths) == set(SPACES), f"{where}: gave widths of other spaces than it was asked for"
    for space, k in widths.items():
        assert k in cost.widths[space], (
            f"{where}: gave '{space.name}' {k}, which is not in `cost.widths`"
        )
    again = selector.allocate(spectra(seed), cost, asked)
    assert dict(widths) == dict(again), f"{where}: gave other widths the second time"
    if selector.needs_budget:
        assert stored(widths) <= budget, f"{where}: spends {stored(widths)} of {budget}"
        roomy = selector.allocate(spectra(seed), cost, stored({}))
        assert all(k == s.dim for s, k in roomy.items()), f"{where}: cuts where nothing must go"


# --- What selectors are tried on.

SPACES = [
    Space("mlp.0", Kind.MLP, 48, Group.MONOMIAL, block=0, stage=1),
    Space("mlp.1", Kind.MLP, 20, Group.MONOMIAL, block=1, stage=1),
    Space("vo.0", Kind.VO, 8, Group.INVERTIBLE, 2, block=0, stage=0),
]


def stored(widths: Mapping[Space, int]) -> int:
    """What a choice stores: a price a direction, and something that no choice removes."""
    return 1000 + sum(PRICES[s.kind] * widths.get(s, s.dim) for s in SPACES)


def bill(multiple: int = 1, limit: int | None = None) -> Bill:
    allowed = {s: tuple(sorted({*range(multiple, s.dim, multiple), s.dim})) for s in SPACES}
    limits = {} if limit is None else {"parameters": limit}
    influence = dict(zip(SPACES, (0.1, 0.4, 0.2), strict=True))
    return Bill(
        {"parameters": stored}, limits, allowed, None, influence, {"parameters": stored({})}
    )


def spectra(seed: int) -> dict[Space, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        s: torch.rand(s.copies, s.dim, generator=g, dtype=torch.float64).pow(4).sort(-1, True)[0]
        for s in SPACES
    }


# --- What all contracts say.


def _made(method: Method | type[Method] | str, options: Mapping[str, Any]) -> Method:
    if isinstance(method, str):
        kinds = [k for k in (*BASING, "select", "slice", "round") if method in registry(k)]
        assert kinds, f"no method is called '{method}'; import the module that registers it"
        method = find(kinds[0], method)
    if not isinstance(method, type):
        return method
    assert hasattr(method, "name"), (
        f'{method.__name__}: has no name; write `class X(..., name="x")`'
    )
    return method(**options)


def _says_what_it_is(method: Method) -> None:
    cls = type(method)
    params = getattr(cls, "__dataclass_params__", None)
    assert params is not None and params.frozen, f"{_named(method)}: is no frozen dataclass"
    own = cls.__doc__ or ""
    assert not own.startswith(f"{cls.__name__}("), f"{_named(method)}: has no docstring"
    first = (inspect.getdoc(cls) or "").partition("\n")[0]
    assert len(first) > 20, f"{_named(method)}: its docstring does not say in a line what it does"


def _round_trips(method: Method) -> None:
    key = "rotate" if method.kind in BASING else method.kind
    if key == "round":
        return
    step = {"spaces": "mlp", key: method.spec()} | ({"select": "uniform"} if key == "slice" else {})
    text: dict[str, Any] = {"model": "m", "calibrate": {"data": "d"}, "steps": [step]}
    if key == "slice" or (isinstance(method, Selector) and method.needs_budget):
        text["budget"] = {"parameters": 0.9}
    again = getattr(parse_recipe(Recipe.from_dict(text).to_yaml()).steps[0], key)
    assert again == method, f"{_named(method)}: a recipe reads {again} of {method}"


def _on_each_space(rotator: Rotator, families: Iterable[str]) -> None:
    served = 0
    for family in families:
        at = ready(family)
        for kind in KINDS:
            space = at.space(kind)
            if serves(rotator, space):
                served += 1
                keeps_its_contract(rotator, space, at)
                measures_what_it_needs(rotator, space, at)
                basis = rotator.fit(space, copy.deepcopy(at.moments))
                leaves_the_logits(rotator, space, Change.rotation(basis.A), at)
    assert served, f"{_named(rotator)}: serves no space; see its `produces` and `kinds`"


def _of_basis(method: Rotator | Joint, space: Space, basis: Basis) -> None:
    A, energy = basis.A.matrix(), basis.energy
    _hold(method, space, A.dtype is energy.dtype is torch.float64, "computes in less than float64")
    if method.produces is not Group.ROTARY:  # which is checked by the space's pairs
        _hold(method, space, in_group(method.produces, basis.A), "gave a basis outside `produces`")
    _hold(
        method,
        space,
        not A.requires_grad and not energy.requires_grad,
        "gave what requires gradients, so that weights stay in memory",
    )
    falls = method.nested or bool((energy.diff(dim=-1) <= 0).all())
    _hold(method, space, falls, "gave energies that rise; sort them, or say `nested`")


def _same(one: Basis, other: Any) -> bool:
    return torch.equal(one.A.matrix(), other.A.matrix()) and torch.equal(one.energy, other.energy)


def _options(method: Method) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}  # type: ignore[arg-type]


def _faultless(method: Method, call: Any) -> Any:
    try:
        return call()
    except InvarianceError as e:
        raise AssertionError(f"{_named(method)}: {e}") from e


def _hold(method: Method, space: Space, fine: bool, what: str) -> None:
    assert fine, f"{_named(method)}, space '{space.name}': {what}"


def _named(method: Method) -> str:
    return f"{method.kind} method '{method.name}'"
