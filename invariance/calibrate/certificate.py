"""The certificate of a model that is not in memory: float64 streams side by side, stage by stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.change import Change
from ..core.memory import trim
from ..core.operator import Operator
from ..core.progress import Progress, quiet
from ..model.axes import Edge
from ..model.layout import Layout
from ..model.source import Source
from ..model.streamed import Streamed
from ..model.verify import CHANGED, Certificate, half, tolerance
from ..model.working import Working
from .batch import Batch
from .enter import enter


@dataclass(frozen=True)
class Form:
    """The canonical form that bases are of: whether gains of norms are folded, and whether tied embeddings stay tied."""

    fold: bool
    tie: str = "untie"


class Rotations(Mapping[str, Change]):
    """Bases of spaces as changes, each made when it is asked for. Names with one basis get one change."""

    def __init__(self, bases: Mapping[str, Operator], shared: Mapping[str, str]) -> None:
        self.bases, self.shared = bases, shared
        self.last: dict[
            str, Change
        ] = {}  # of the points of a stage, and of bases that several share

    def __getitem__(self, name: str) -> Change:
        key = self.shared.get(name, name)
        if key not in self.last:
            self.last[key] = Change.rotation(self.bases[key])
        return self.last[key]

    def keep(self, names: list[str]) -> None:
        """Forget all but the changes of some spaces."""
        count = Counter(self.shared.values())
        keys = {self.shared.get(n, n) for n in names} | {k for k, n in count.items() if n > 1}
        self.last = {key: change for key, change in self.last.items() if key in keys}

    def __iter__(self) -> Iterator[str]:
        return iter([*self.shared, *(n for n in self.bases if n not in self.shared.values())])

    def __len__(self) -> int:
        return len(list(iter(self)))


def spaces_of(layout: Layout, edge: Edge) -> list[str]:
    """The spaces that a stage's weights lie in: the points at its two ends, and those inside it."""
    return [edge.source, edge.target, *layout.inside(edge)]


@torch.no_grad()
def certify(
    source: Source,
    rotations: Rotations,
    ids: Int[Tensor, "B T"],
    form: Form,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress = quiet,
) -> Certificate:
    """As ``verify.certify``, of a source: only one stage is in memory at a time, in float64.

    Four streams go side by side: through the family's own layers, through the rewritten stages, through those rotated,
    and through those of the control. Logits are compared by rows of the head.
    """
    split = [n for n in rotations if n.startswith("edge.")]
    family, plain = Streamed(source, torch.float64, device), Working(source, device=device)
    turned, control = (
        Working(source, fold=form.fold, tie=form.tie, split=split, device=device) for _ in range(2)
    )
    layout = turned.layout
    halves = half(layout, rotations, seed)
    first, last = layout.points[0], layout.points[-1]
    for point in dict.fromkeys((first, last)):
        if point in rotations:
            change = rotations[point]
            turned.change_ends({point: change})
            whole = halves[point].encode.contract(change.encode.matrix()[0])
            both = Change(whole[None], change.decode)
            control.change_ends({point: both})
    tokens = [(ids, torch.ones_like(ids, dtype=torch.bool))]
    streams = [enter(parts, tokens, torch.float64)[0] for parts in (family, plain, turned, control)]
    own, rewritten, rotated, wrong = streams
    for edge in progress(layout.edges, "verify", layout.depth):
        if edge.source == edge.entry:
            _pass_layer(family, own, edge.block)
        rewritten.x = rewritten.through(plain.stage(edge, torch.float64), edge)
        names = [n for n in spaces_of(layout, edge) if n in rotations]
        stage = turned.hold(edge)
        turned.change({n: rotations[n] for n in names}, [edge])
        rotated.x = rotated.through(stage, edge)
        turned.change({n: halves[n] for n in names}, [edge])
        wrong.x = wrong.through(stage, edge)
        turned.free(edge)
        rotations.keep(names)
    errors = _compare([family, plain, turned, control], streams)
    return Certificate(
        relative_error=errors[2],
        tolerance=tolerance(torch.float64, layout.depth, CHANGED),
        negative_control=errors[3],
        spaces=len(rotations),
        restructured_error=errors[0],
        restructured_tolerance=tolerance(torch.float32, layout.depth),  # families' norms compute so
    )


class Elements(Mapping[str, Operator]):
    """A random element of every space's group, drawn when it is asked for."""

    def __init__(self, layout: Layout, seed: int) -> None:
        self.spaces, self.seed = layout.spaces, seed

    def __getitem__(self, name: str) -> Operator:
        return self.spaces[name].element(self.seed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.spaces)

    def __len__(self) -> int:
        return len(self.spaces)


def certify_random(
    source: Source,
    ids: Int[Tensor, "B T"],
    *,
    seed: int,
    device: str | torch.device = "cpu",
    progress: Progress = quiet,
) -> Certificate:
    """The certificate of random elements of all spaces' groups at once, each point of the stream its own."""
    rotations = Rotations(Elements(Working(source, fold=True).layout, seed), {})
    form = Form(fold=True)
    return certify(source, rotations, ids, form, seed=seed + 1, device=device, progress=progress)


def _pass_layer(family: Streamed, batch: Batch, number: int) -> None:
    out = family.layer(number)(batch.x, **batch.contexts[number])
    batch.x = out[0] if isinstance(out, tuple) else out
    trim()


def _compare(parts: list[Streamed | Working], streams: list[Batch]) -> list[float]:
    """‖logits − reference‖ / ‖reference‖ of each, where the second one is the reference."""
    squares = torch.zeros(len(parts), dtype=torch.float64)
    total = 0.0
    heads = [p.heads() for p in parts]
    for each in zip(*heads, strict=True):
        found = [logits(batch.x) for (_, logits), batch in zip(each, streams, strict=True)]
        total += found[1].square().sum().item()
        squares += torch.stack([(logits - found[1]).square().sum().cpu() for logits in found])
    return [float(value) for value in (squares / total).sqrt()]
