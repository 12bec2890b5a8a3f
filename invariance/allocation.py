"""Which width every space gets: the selectors of a plan are asked in turn, the one that spends the budget last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from .budget import Bill, Predicted, spendable
from .demand import Demand, Loss, Spectra, Unit, Widths
from .errors import InputError
from .interfaces import Selector, Statistic
from .recipe import Constraints
from .space import Space

if TYPE_CHECKING:
    from .plan import Plan


def allocate(chart: Plan, spectra: Spectra | None, loss: Loss | None = None,
             influence: Sequence[float] | None = None, within: Widths | None = None) -> Widths | None:  # fmt: skip
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
            if selector.needs_budget and not selector.depth:  # those know which blocks may not go together
                bill.check()
            if (
                (selector.needs_spectra and spectra is None)
                or (selector.measures and loss is None)
                or (Statistic.COSINE in selector.needs and influence is None)
            ):
                return None
            energies = {d.space: None if spectra is None else d.pooled(spectra) for d in demands}
            widths = selector.allocate(energies, bill, bill.limit)
            for demand in demands:
                demand.check(widths.get(demand.space), within.get(demand.space.name))
            if selector.needs_budget and bill.limit is not None and (spent := bill(widths)) > bill.limit:
                raise InputError(
                    f"selector '{selector.name}' gave widths that spend {spent:,.6g} of a budget of {bill.limit:,.6g}. "
                    "This is a fault of the method, not of the recipe."
                )
        except InputError as e:
            raise InputError(
                f"{chart.recipe.where('steps', demands[0].units[0].step, 'select')}: {e}"
            ) from None
        kept |= {m: widths[d.space] for d in demands for m in d.members}
        cuts = any(widths[d.space] < d.space.dim for d in demands)
        losses.append(widths.loss if isinstance(widths, Predicted) else None if cuts else 0.0)
    kept |= _whole_again(chart, kept)
    known = [n for n in losses if n is not None]
    return Predicted(kept, sum(known)) if len(known) == len(losses) else kept


def check_choices(chart: Plan) -> None:
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


def _in_turn(chart: Plan) -> list[tuple[Selector | None, list[Demand]]]:
    """The selectors with what they decide on, in the order in which they are asked: those of depth that leave the rest to
    others, units that no selector cuts, then the others."""
    return [*_by_selector(_demands(chart, chart.depth)), *_by_selector(_demands(chart, chart.units))]


def _demands(chart: Plan, units: Sequence[Unit]) -> list[Demand]:
    """The units, those of a step whose spaces get one width as one demand."""

    def constraints(unit: Unit) -> Constraints:
        found = chart.recipe.steps[unit.step].widths or Constraints()
        return found if unit.rank is None else found.model_copy(update={"same": True})

    found: dict[object, list[Unit]] = {}
    for n, unit in enumerate(units):
        same = unit.select is not None and constraints(unit).same
        found.setdefault(("step", unit.step) if same else n, []).append(unit)
    return [Demand(tuple(units), constraints(units[0])) for units in found.values()]


def _by_selector(demands: Sequence[Demand]) -> list[tuple[Selector | None, list[Demand]]]:
    """The demands by their selectors; the one that spends the budget last."""
    found: dict[Selector | None, list[Demand]] = {}
    for demand in demands:
        found.setdefault(demand.select, []).append(demand)
    return sorted(found.items(), key=lambda item: -1 if item[0] is None else int(item[0].needs_budget))


def _allowed(
    chart: Plan, demands: list[Demand], kept: Widths, within: Widths
) -> dict[Space, tuple[int, ...]]:
    """The widths that may be chosen, ascending. One attention has to stay: where a budget could take all, the first does
    (selectors of depth keep a block)."""
    found: dict[Space, tuple[int, ...]] = {}
    for demand in demands:
        try:
            each = demand.allowed(chart.blocks, chart.layout.branches.values())
        except InputError as e:
            raise InputError(f"{chart.recipe.where('steps', demand.units[0].step, 'widths')}: {e}") from None
        most = within.get(demand.space.name, demand.space.dim)
        found[demand.space] = tuple(k for k in each if k <= most) or (most,)
    spending = [d for d in demands if d.select and d.select.needs_budget and not d.select.depth]
    vanishing = {m: d.space for d in spending if not found[d.space][0] for m in d.members}
    left = chart.layout.counting(kept)
    if left and all(n in vanishing for n in left):
        found[vanishing[left[0]]] = found[vanishing[left[0]]][1:] or (0,)
    return found


def _bill(chart: Plan, demands: list[Demand], kept: Widths, allowed: Mapping[Space, tuple[int, ...]], loss: Loss | None,
          influence: Sequence[float] | None) -> Bill:  # fmt: skip
    """What widths of some demands cost, all others as they are kept."""

    def named(widths: Mapping[Space, int]) -> dict[str, int]:
        return {**kept, **{m: widths[d.space] for d in demands if d.space in widths for m in d.members}}

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


def _whole_again(chart: Plan, kept: Widths) -> dict[str, int]:
    """The ranks that save nothing beside the other cuts: those matrices stay as they are."""
    spaces = {n: s for n, s in chart.layout.spaces.items() if s.kind == "edge"}
    ranks = [n for n, k in kept.items() if n in spaces and k < spaces[n].dim]
    smaller = set(chart.layout.factored(kept)) if ranks else ()
    return {n: spaces[n].dim for n in ranks if n not in smaller}
