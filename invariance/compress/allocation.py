"""Which width every space gets: the selectors of a plan are asked in turn, the one that spends the budget last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

from ..calibrate.statistic import Statistic
from ..core.errors import InputError
from ..core.space import Space
from ..method.budget import Bill, Predicted, spendable
from ..method.checked import allocated
from ..method.interfaces import Selector
from ..recipe.budget import Constraints
from ..recipe.recipe import Recipe
from .demand import Demand, Loss, Spectra, Unit, Widths

HEADS = ("vo", "qk")  # a stock config has one width of heads


class Laid(Protocol):
    """What allocation reads of a layout."""

    @property
    def spaces(self) -> Mapping[str, Space]: ...
    @property
    def branches(self) -> Mapping[str, str]: ...
    @property
    def windows(self) -> Mapping[str, int | None]: ...
    def counting(self, widths: Widths) -> list[str]: ...
    def factored(self, widths: Widths) -> list[str]: ...


class Chart(Protocol):
    """What allocation reads of a plan."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def layout(self) -> Laid: ...
    @property
    def units(self) -> tuple[Unit, ...]: ...
    @property
    def depth(self) -> tuple[Unit, ...]: ...
    @property
    def blocks(self) -> int: ...
    def why_not_stock(self, widths: Widths) -> str | None: ...
    def amount(self, resource: str, widths: Widths) -> float: ...
    def dense_amount(self, resource: str) -> int: ...
    def check_attention(self, widths: Widths) -> None: ...


def allocate(
    chart: Chart,
    spectra: Spectra | None,
    loss: Loss | None = None,
    influence: Sequence[float] | None = None,
    within: Widths | None = None,
) -> Widths | None:
    """The width of every unit's members, or None where a selector asks for what is not there yet.

    ``loss`` measures widths on held-out tokens, for selectors that declare ``measures``; ``influence`` is that of
    every block; no width is above that in ``within``. The widths are ``Predicted`` where all selectors that cut
    predict their loss.
    """
    within = within or {}
    kept: dict[str, int] = {}
    losses: list[float | None] = []
    for selector, asked in _in_turn(chart):
        gone = {m for m, k in kept.items() if not k}
        demands = [left for d in asked if (left := d.without(gone)) is not None]
        if not demands:
            continue
        if selector is None:
            kept |= {m: d.space.dim for d in demands for m in d.members}
            continue
        allowed = _allowed(chart, demands, kept, within)
        try:
            bill = _bill(chart, demands, kept, allowed, loss, influence)
            if selector.needs_budget and not selector.depth:
                bill.check()  # selectors of depth know which blocks may not go together
            if (
                (selector.needs_spectra and spectra is None)
                or (selector.measures and loss is None)
                or (Statistic.COSINE in selector.needs and influence is None)
            ):
                return None
            widths = _chosen(selector, demands, bill, spectra, within)
        except InputError as e:
            raise InputError(
                f"{chart.recipe.where('steps', demands[0].units[0].step, 'select')}: {e}"
            ) from None
        kept |= {m: widths[d.space] for d in demands for m in d.members}
        cuts = any(widths[d.space] < d.space.dim for d in demands)
        losses.append(widths.loss if isinstance(widths, Predicted) else None if cuts else 0.0)
    kept |= _whole_again(chart, kept)
    if chart.recipe.stock:
        _check_stock(chart, kept)
    known = [n for n in losses if n is not None]
    return Predicted(kept, sum(known)) if len(known) == len(losses) else kept


def _chosen(
    selector: Selector,
    demands: list[Demand],
    bill: Bill,
    spectra: Spectra | None,
    within: Widths,
) -> Mapping[Space, int]:
    """What a selector chooses, checked. Raises InputError."""
    energies = {d.space: None if spectra is None else d.pooled(spectra) for d in demands}
    widths = selector.allocate(energies, bill, bill.limit)
    for demand in demands:
        demand.check(widths.get(demand.space), within.get(demand.space.name))
    allocated(selector, widths, bill)
    limit = bill.limit if selector.needs_budget else None
    if limit is not None and (spent := bill(widths)) > limit:
        raise InputError(
            f"selector '{selector.name}' gave widths that spend {spent:,.6g} of a budget of {limit:,.6g}. "
            "This is a fault of the method, not of the recipe."
        )
    return widths


def check_choices(chart: Chart) -> None:
    """Raises InputError where windows differ, and a selector of depth, whatever it finds, may let every attention of the
    first one go."""
    layout = chart.layout
    first = layout.counting({})
    if len(first) == len(layout.windows):
        return
    least: dict[str, int] = {}
    for selector, demands in _in_turn(chart):
        for demand in demands if selector is not None and selector.depth else ():
            k = demand.allowed(chart.blocks, layout.branches.values())[0]
            least |= {m: k for m in demand.members if m in first}
    chart.check_attention(least)


def _in_turn(chart: Chart) -> list[tuple[Selector | None, list[Demand]]]:
    """The selectors with what they decide on, in the order in which they are asked: those of depth that leave the rest to
    others, units that no selector cuts, then the others."""
    return [
        *_by_selector(_demands(chart, chart.depth)),
        *_by_selector(_demands(chart, chart.units)),
    ]


def _demands(chart: Chart, units: Sequence[Unit]) -> list[Demand]:
    """The units, those that get one width as one demand: where a step says so, and in what is to be a stock checkpoint, those
    of which its config has one number."""

    def constraints(unit: Unit) -> Constraints:
        found = chart.recipe.steps[unit.step].widths or Constraints()
        return found if unit.rank is None else found.model_copy(update={"same": True})

    def shared(n: int, unit: Unit) -> object:
        if unit.select is None:
            return n
        if chart.recipe.stock and not unit.select.depth and unit.space.kind != "edge":
            return HEADS if unit.space.kind in HEADS else (unit.space.kind, unit.space.part)
        return ("step", unit.step) if constraints(unit).same else n

    found: dict[object, list[Unit]] = {}
    for n, unit in enumerate(units):
        found.setdefault(shared(n, unit), []).append(unit)
    made = [
        Demand(tuple(units), tuple(dict.fromkeys(map(constraints, units))))
        for units in found.values()
    ]
    for demand in made:
        _check_shared(chart, demand)
    return made


def _check_shared(chart: Chart, demand: Demand) -> None:
    """Raises InputError where spaces get one width, and nothing could choose it."""
    first, *others = demand.units
    try:
        demand.protected(chart.blocks)
    except InputError as e:
        raise InputError(f"{chart.recipe.where('steps', first.step, 'widths')}: {e}") from None
    for unit in others:
        both = f"'{first.space.name}' and '{unit.space.name}' get one width, since a stock config has one"
        if unit.select != first.select:
            raise InputError(
                f"{chart.recipe.where('steps', unit.step, 'select')}: {both}, and two selectors would choose it. Use the same "
                "one, with the same options, in both steps."
            )
        if (
            first.select is not None
            and first.select.needs_spectra
            and unit.rotate.unit != first.rotate.unit
        ):
            raise InputError(
                f"{chart.recipe.where('steps', unit.step, 'rotate')}: {both}, so their energies are added, and those of "
                f"'{unit.rotate.name}' are in {unit.rotate.unit}, those of '{first.rotate.name}' in {first.rotate.unit}. Give "
                "both rotators `metric: fisher`, or take a selector that reads no energies."
            )


def _by_selector(demands: Sequence[Demand]) -> list[tuple[Selector | None, list[Demand]]]:
    """The demands by their selectors; the one that spends the budget last."""
    found: dict[Selector | None, list[Demand]] = {}
    for demand in demands:
        found.setdefault(demand.select, []).append(demand)
    return sorted(
        found.items(), key=lambda item: -1 if item[0] is None else int(item[0].needs_budget)
    )


def _allowed(
    chart: Chart, demands: list[Demand], kept: Widths, within: Widths
) -> dict[Space, tuple[int, ...]]:
    """The widths that may be chosen, ascending. One attention has to stay: where a budget could take all, the first does
    (selectors of depth keep a block)."""
    found: dict[Space, tuple[int, ...]] = {}
    for demand in demands:
        try:
            each = demand.allowed(chart.blocks, chart.layout.branches.values())
        except InputError as e:
            raise InputError(
                f"{chart.recipe.where('steps', demand.units[0].step, 'widths')}: {e}"
            ) from None
        if chart.recipe.stock:
            each = _stock(chart, demand, each, kept)
        most = within.get(demand.space.name, demand.space.dim)
        found[demand.space] = tuple(k for k in each if k <= most) or (most,)
    spending = [d for d in demands if d.select and d.select.needs_budget and not d.select.depth]
    vanishing = {m: d.space for d in spending if not found[d.space][0] for m in d.members}
    left = chart.layout.counting(kept)
    if left and all(n in vanishing for n in left):
        found[vanishing[left[0]]] = found[vanishing[left[0]]][1:] or (0,)
    return found


def _stock(chart: Chart, demand: Demand, allowed: tuple[int, ...], kept: Widths) -> tuple[int, ...]:
    """Those of the widths with which a stock checkpoint can hold the model; depth is asked for when it is chosen."""
    if demand.select is None or demand.select.depth:
        return allowed
    why = {k: chart.why_not_stock({**kept, **dict.fromkeys(demand.members, k)}) for k in allowed}
    found = tuple(k for k, reason in why.items() if reason is None)
    cut = [k for k in allowed if k < demand.space.dim]
    if cut and not any(k in found for k in cut):
        raise InputError(
            f"{chart.recipe.where('steps', demand.units[0].step)}: with `stock: true`, space '{demand.space.name}' cannot be cut: "
            f"{why[cut[-1]]}. Cut in the same recipe what goes with it (all layers, values with queries and keys), leave the step "
            "out, or remove `stock`."
        )
    return found or allowed


def _check_stock(chart: Chart, widths: Widths) -> None:
    if why := chart.why_not_stock(widths):
        raise InputError(
            f"{chart.recipe.where('stock')}: no stock checkpoint could hold this model: {why}. Change that, or remove `stock`."
        )


def _bill(
    chart: Chart,
    demands: list[Demand],
    kept: Widths,
    allowed: Mapping[Space, tuple[int, ...]],
    loss: Loss | None,
    influence: Sequence[float] | None,
) -> Bill:
    """What widths of some demands cost, all others as they are kept."""

    def named(widths: Mapping[Space, int]) -> dict[str, int]:
        return {
            **kept,
            **{m: widths[d.space] for d in demands if d.space in widths for m in d.members},
        }

    def spent(resource: str, widths: Mapping[Space, int]) -> float:
        return chart.amount(resource, named(widths))

    limits = chart.recipe.budget.limits if chart.recipe.budget else {}
    dense = {r: chart.dense_amount(r) for r in limits}
    return Bill(
        amounts={r: partial(spent, r) for r in limits or ("parameters",)},
        limits={r: spendable(share, dense[r]) for r, share in limits.items()},
        widths=allowed,
        loss=None if loss is None else lambda w: loss(named(w)),
        influence=None if influence is None else {d.space: d.mean(influence) for d in demands},
        dense=dense,
        protected=frozenset(d.space for d in demands if d.protected(chart.blocks)),
    )


def _whole_again(chart: Chart, kept: Widths) -> dict[str, int]:
    """The ranks that save nothing beside the other cuts: those matrices stay as they are."""
    spaces = {n: s for n, s in chart.layout.spaces.items() if s.kind == "edge"}
    ranks = [n for n, k in kept.items() if n in spaces and k < spaces[n].dim]
    smaller = set(chart.layout.factored(kept)) if ranks else ()
    return {n: spaces[n].dim for n in ranks if n not in smaller}
