"""What cuts are predicted to lose: by selectors, by energies in nats, or to second order by gradients of the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibrate.fisher import SEED, score
from ..calibrate.moments import real_tokens
from ..calibrate.walk import inside, norm_at, tap
from ..core.change import Basis, Change
from ..core.progress import Progress, quiet
from ..io.data import Tokens
from ..method.budget import Predicted
from ..model.layout import Layout
from ..model.modules import Stage
from ..model.verify import copy_in
from .demand import Unit, Widths

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
    units: Sequence[Unit],
    widths: Widths,
    bases: Mapping[str, Basis],
    gradients: Gradients | None,
    changes: Callable[[], Mapping[str, Change]],
) -> Foretold:
    """What widths are predicted to lose, with the changes that they make; ``bases`` by a unit's first member."""
    by = told_by(units, widths)
    if by is None:
        return Foretold(0.0)
    if isinstance(widths, Predicted):
        return Foretold(widths.loss, by)
    if by == "energies":
        lost = [
            bases[u.space.name].energy[:, widths[u.space.name] :].sum().item()
            for u in narrowed(units, widths)
        ]
        return Foretold(sum(lost), by)
    loss = math.nan if gradients is None else gradients.loss(changes())
    return Foretold(loss, by) if math.isfinite(loss) else UNTOLD


@dataclass(frozen=True)
class Gradients:
    """Of some tokens: the signal x of each space, and g = ∂/∂x Σ_s log p(y_s) by what its readers get of it."""

    layout: Layout  # of the dense model's canonical form
    signals: Mapping[str, Float[Tensor, "n w"]]
    gradients: Mapping[str, Float[Tensor, "n w"]]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for found in (self.signals, self.gradients) for x in found.values())

    def loss(self, changes: Mapping[str, Change]) -> float:
        """Nats of KL a token, to second order in what readers lose: ½ E[(Σ gᵀ(x' − x))²], the sum over all spaces that are
        cut, x' = D Eᵀ x + offset. Errors of different spaces at one token count together, those of different tokens as
        uncorrelated; what shortcuts lose between two bases, and refits win back, is not known yet. Of a branch that goes
        only the space that it vanishes with counts. Not a number where no token tells."""
        gone = self.layout.gone({name: change.width for name, change in changes.items()})
        along = torch.zeros(()) if self.signals else torch.tensor(torch.nan)
        for name, x in self.signals.items():
            space, change = self.layout.spaces[name], changes.get(name)
            if change is None or change.width == space.dim:
                continue
            readers = [reader for reader, _ in self.layout.readers(name)]
            if not change.width or not all(reader.startswith(gone) for reader in readers):
                along = along + (self.gradients[name] * (change.read(space, x) - x)).sum(-1)
        return along.square().mean().item() / 2


def measure(
    model: PreTrainedModel,
    layout: Layout,
    spaces: Iterable[str],
    tokens: Tokens,
    progress: Progress = quiet,
    *,
    skip: int = 0,
) -> Gradients:
    """Signals and gradients of spaces, from one backward pass a sequence through a float32 copy of the canonical model.

    The labels y_s are drawn as for the Fisher (``fisher.measure``), so that E[g gᵀ] over them is the Fisher of what the
    readers of a space get, and of the stream's points that of the branches which read it there, not of the stream behind.
    The first ``skip`` tokens of a sequence are left out.
    """
    names = list(spaces)
    twin = copy_in(torch.float32, model).requires_grad_(False)
    g = torch.Generator().manual_seed(SEED)
    signals: dict[str, list[Tensor]] = {n: [] for n in names}
    gradients: dict[str, list[Tensor]] = {n: [] for n in names}
    telling = tokens.mask[:, skip:].any(1).nonzero()[:SEQUENCES, 0]
    ids, mask = (x[telling, : skip + TOKENS] for x in (tokens.ids, tokens.mask))
    sequences = list(Tokens(ids, mask).batches(1)) if len(telling) else []
    with _read(twin, layout, names) as read:
        for ids, real in progress(sequences, "measure gradients", len(sequences)):
            seen = real.clone()
            seen[:, :skip] = False
            found = score(twin, ids, real, g, lambda: [read[n] for n in names])
            for name, gradient in zip(names, found, strict=True):
                signals[name].append(real_tokens(read[name].detach(), seen).cpu())
                gradients[name].append(real_tokens(gradient, seen).cpu())
    joined = ({n: torch.cat(x) for n, x in found.items() if x} for found in (signals, gradients))
    return Gradients(layout, *joined)


@contextmanager
def _read(model: PreTrainedModel, layout: Layout, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """What readers of spaces get when the model runs, ready to be differentiated by; the stream passes them by."""
    read: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> Tensor:
        read[name] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return read[name]

    handles = []
    for name in names:
        module, before = _tapped(model, layout, name)
        if before:
            handles.append(
                module.register_forward_pre_hook(lambda _m, a, n=name: (keep(n, a[0]), *a[1:]))
            )
        else:
            handles.append(module.register_forward_hook(lambda _m, _a, y, n=name: keep(n, y)))
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _tapped(model: PreTrainedModel, layout: Layout, name: str) -> tuple[nn.Module, bool]:
    """The module that a space's signal enters (True) or leaves."""
    space = layout.spaces[name]
    if space.kind == "residual":
        return norm_at(model, layout, name), True
    edge = next(e for e in layout.edges if name in inside(layout, e))
    stage = model.get_submodule(edge.stage)
    assert isinstance(stage, Stage)
    return tap(stage, space)
