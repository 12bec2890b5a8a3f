"""What cuts are predicted to lose: by selectors, by energies in nats, or to second order by gradients of the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..calibrate.backward import backward
from ..calibrate.fisher import SEED
from ..calibrate.moments import real_tokens
from ..calibrate.probes import tap
from ..core.change import Change
from ..core.progress import Progress, quiet
from ..core.space import Space
from ..core.spill import Spill
from ..io.data import Tokens
from ..method.budget import Predicted
from ..model.axes import Edge
from ..model.layout import Layout
from ..model.modules import Stage
from ..model.working import Stages
from .demand import Spectra, Unit, Widths

SEQUENCES, TOKENS = 2, 256  # of each the first that are not left out


class Foretold(NamedTuple):
    """What a cut is predicted to lose, in nats per token, and what told: selector, energies or gradients."""

    loss: float | None = None
    by: str | None = None


UNTOLD = Foretold()


def narrowed(units: Iterable[Unit], widths: Widths) -> list[Unit]:
    """The units that widths cut."""
    return [u for u in units if widths[u.space.name] < u.space.dim]


def told_by(units: Iterable[Unit], widths: Widths) -> str | None:
    """What tells the loss of widths that cut something: their selectors; else the energies that they cut, where those of
    all spaces that are cut are losses in nats per token, and assume the refit that the slicer makes, or none;
    else gradients."""
    found = narrowed(units, widths)
    if not found:
        return None
    if isinstance(widths, Predicted):
        return "selector"
    nats = all(
        u.rotate.nats and u.slice is not None and u.slice.mixes == u.rotate.refits for u in found
    )
    return "energies" if nats else "gradients"


def foretell(
    units: Sequence[Unit], widths: Widths, spectra: Spectra, loss: Callable[[], float]
) -> Foretold:
    """What widths are predicted to lose; ``loss`` says it by gradients, ``spectra`` are by a unit's first member."""
    by = told_by(units, widths)
    if by is None:
        return Foretold(0.0)
    if isinstance(widths, Predicted):
        return Foretold(widths.loss, by)
    if by == "energies":
        cut = narrowed(units, widths)
        lost = [spectra[u.space.name][:, widths[u.space.name] :].sum().item() for u in cut]
        return Foretold(sum(lost), by)
    nats = loss()
    return Foretold(nats, by) if math.isfinite(nats) else UNTOLD


@dataclass(frozen=True)
class Gradients:
    """Of some tokens: the signal x of each space, and g = ∂/∂x Σ_s log p(y_s) by what its readers get of it."""

    layout: Layout  # of the dense model's canonical form
    signals: Mapping[Any, Float[Tensor, "n w"]]
    gradients: Mapping[Any, Float[Tensor, "n w"]]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for found in (self.signals, self.gradients) for x in found.values())

    def loss(self, changes: Mapping[str, Change]) -> float:
        """Nats of KL a token, to second order in what readers lose: ½ E[(Σ gᵀ(x' − x))²], the sum over all spaces that are
        cut, x' = D Eᵀ x + offset. Errors of different spaces at one token count together, those of different tokens as
        uncorrelated; what shortcuts lose between two bases, and refits win back, is not known yet. Of a branch that goes
        only the space that it vanishes with counts. Not a number where no token tells."""
        lost = Lost(self, {name: change.width for name, change in changes.items()})
        for name, change in changes.items():
            lost.add(name, change)
        return lost.nats


class Lost:
    """What changes lose by gradients, added up change by change: ``Gradients.loss``."""

    def __init__(self, known: Gradients, widths: Widths) -> None:
        self.known, self.gone = known, known.layout.gone(widths)
        self.along = torch.zeros(()) if known.signals else torch.tensor(torch.nan)

    def add(self, name: str, change: Change) -> None:
        layout = self.known.layout
        space = layout.spaces[name]
        if name not in self.known.signals or change.width == space.dim:
            return
        readers = [reader for reader, _ in layout.readers(name)]
        if not change.width or not all(reader.startswith(self.gone) for reader in readers):
            x, g = self.known.signals[name], self.known.gradients[name]
            self.along = self.along + (g * (change.read(space, x) - x)).sum(-1)

    @property
    def nats(self) -> float:
        return self.along.square().mean().item() / 2


def measure(
    parts: Stages,
    spaces: Iterable[str],
    tokens: Tokens,
    progress: Progress = quiet,
    *,
    skip: int = 0,
) -> Gradients:
    """Signals and gradients of spaces, from a float32 pass through the canonical model and back (``backward``).

    The labels y_s are drawn as for the Fisher (``fisher.measure``), so that E[g gᵀ] over them is the Fisher of what the
    readers of a space get, and of the stream's points that of the branches which read it there, not of the stream behind.
    The first ``skip`` tokens of a sequence are left out.
    """
    layout, names = parts.layout, set(spaces)
    last = layout.points[-1]  # which the head alone reads
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def taps(edge: Edge, stage: Stage) -> Iterator[dict[str, Tensor]]:
        read: dict[str, Tensor] = {}
        handles = [
            _tap(read, stage, layout.spaces[n])
            for n in (edge.source, *layout.inside(edge))
            if n in names and stage.branches
        ]
        try:
            yield read
        finally:
            for handle in handles:
                handle.remove()

    def take(name: str, x: Tensor, gradient: Tensor, seen: Tensor) -> None:
        if name.startswith(READ) or (name == last and last in names):
            both = real_tokens(x, seen).cpu(), real_tokens(gradient, seen).cpu()
            found.setdefault(name.removeprefix(READ), []).append(both)

    telling = tokens.mask[:, skip:].any(1).nonzero()[:SEQUENCES, 0]
    ids, mask = (x[telling, : skip + TOKENS] for x in (tokens.ids, tokens.mask))
    if len(telling):
        backward(parts, Tokens(ids, mask), taps, take, skip=skip, seed=SEED, progress=progress)
    signals, gradients = Spill(), Spill()
    for name, both in found.items():
        xs, gs = zip(*both, strict=True)
        signals[name], gradients[name] = torch.cat(xs), torch.cat(gs)
    return Gradients(layout, signals, gradients)


READ = "read "  # before the name of a space: what its readers get, where the stream passes them by


def _tap(read: dict[str, Tensor], stage: Stage, space: Space) -> Any:
    """Keeps what readers of a space get, ready to be differentiated by."""

    def keep(x: Tensor) -> Tensor:
        read[READ + space.name] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return read[READ + space.name]

    if space.kind == "residual":
        assert stage.norm is not None
        return stage.norm.register_forward_pre_hook(lambda _m, a: (keep(a[0]), *a[1:]))
    module, before = tap(stage, space)
    if before:
        return module.register_forward_pre_hook(lambda _m, a: (keep(a[0]), *a[1:]))
    return module.register_forward_hook(lambda _m, _a, y: keep(y))
