"""The plan of a run: which spaces share a basis, which methods serve them, what widths cost. Pure data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PretrainedConfig

from ..calibrate.moments import Key
from ..calibrate.statistic import Statistic
from ..core.errors import InputError
from ..core.group import Group
from ..core.shortcuts import enough
from ..io.export import config_obstacle, obstacle
from ..measure.latency import Latency
from ..method.interfaces import Joint, Selector
from ..model.layout import Layout, Parameters
from ..model.vocabulary import Shape
from ..recipe.budget import Budget
from ..recipe.recipe import Recipe
from .allocation import allocate
from .demand import Loss, Spectra, Unit, Widths
from .rounding.scheme import check_groups
from .vocabulary import check_vocabulary, spared

NOT_MEASURED = {
    Statistic.SEEN,
    Statistic.READERS,
    Statistic.FISHER,
    Statistic.TAYLOR,
    Statistic.COSINE,
}
MEASURED = frozenset(Statistic) - NOT_MEASURED  # by the walk, for units


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
            u.space.rotary > 0 and u.rotate.produces is Group.ROTARY and not u.rotate.shares_basis
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
        count = self._factored(replace(count, blocks=count.blocks + biases), widths)
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

    def _factored(self, count: Parameters, widths: Widths) -> Parameters:
        """The same where the rows of rare tokens are two factors."""
        if self.shape is None:
            return count
        ends = [self.layout.points[0]] + ([] if self.layout.tied else [self.layout.points[-1]])
        less = [spared(self.layout, self.shape, self.layout.width(p, widths)) for p in ends]
        return replace(count, embedding=count.embedding - less[0], head=count.head - sum(less[1:]))

    @property
    def shape(self) -> Shape | None:
        """How the vocabulary is to be stored, where that is asked for."""
        asked = self.recipe.vocabulary
        return None if asked is None else Shape(asked.common, asked.rank)

    def why_not_stock(self, widths: Widths) -> str | None:
        """Why no stock checkpoint could hold a model of these widths; None where one can."""
        if self.shape is not None:
            return "the rows of rare tokens are two factors"
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
        flops = self.layout.flops(widths, self.segments, self._ranks(widths))
        if self.shape is None:
            return flops
        head = self.layout.width(self.layout.points[-1], widths)
        return flops - 2 * spared(self.layout, self.shape, head)

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
        check_vocabulary(self.recipe, self.layout, widths)
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
