"""What a joint method sees: the canonical model, its spaces and tokens, losses with signals changed, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..calibrate.moments import Moments
from ..calibrate.probes import tap
from ..core.space import Space
from ..io.data import Tokens
from ..model.axes import Edge
from ..model.layout import Layout
from ..model.modules import Stage

Through = Mapping[str, Callable[[Float[Tensor, "B T w"]], Float[Tensor, "B T w"]]]
"""Space → what its readers get in place of its signal, of the same shape; ``Change.read`` is a cut."""


@dataclass(frozen=True, eq=False)
class Scene:
    """The dense model in its canonical form, and what is asked of a joint method.

    ``model`` is in float32, in eval mode, its weights frozen. ``spaces`` are those to be served, each under the name of the
    first of ``members``, which share what it gets. ``widths`` says how many directions of each will stay, None where a
    selector waits for energies. ``tokens`` are those that calibrate, ``moments`` what the method ``needs``.
    """

    model: PreTrainedModel
    layout: Layout
    spaces: Mapping[str, Space]
    members: Mapping[str, tuple[str, ...]]
    widths: Mapping[str, int] | None
    tokens: Tokens
    moments: Moments = field(default_factory=Moments)

    def logits(self, ids: Int[Tensor, "B T"], through: Through = {}) -> Float[Tensor, "B T V"]:
        """The logits, float32, where signals pass through functions; gradients flow through these."""
        with self._changed(through):
            return self.model(input_ids=ids.to(self.model.device), use_cache=False).logits.float()

    def loss(self, ids: Int[Tensor, "B T"], through: Through = {}) -> Float[Tensor, ""]:
        """The mean cross-entropy of the next token, in nats."""
        logits = self.logits(ids, through)[:, :-1].flatten(0, 1)
        return cross_entropy(logits, ids[:, 1:].flatten().to(logits.device))

    def divergence(self, ids: Int[Tensor, "B T"], through: Through) -> Float[Tensor, ""]:
        """The mean KL(dense ‖ changed) of the next token, in nats."""
        with torch.no_grad():
            p = self.logits(ids).log_softmax(-1)
        q = self.logits(ids, through).log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()

    def gradients(
        self, ids: Int[Tensor, "B T"], names: Iterable[str], through: Through = {}
    ) -> dict[str, tuple[Float[Tensor, "B T w"], Float[Tensor, "B T w"]]]:
        """The signal on spaces of the layout, by name, and the gradient of the loss by each."""
        found: dict[str, Tensor] = {}

        def kept(name: str, x: Tensor) -> Tensor:
            found[name] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            return found[name]

        with torch.enable_grad(), self._changed(through):
            handles = [self._hook(name, partial(kept, name)) for name in names]
            try:
                loss = self.loss(ids)
            finally:
                for handle in handles:
                    handle.remove()
            by = torch.autograd.grad(loss, list(found.values()))
        return {n: (x.detach(), g) for (n, x), g in zip(found.items(), by, strict=True)}

    @contextmanager
    def _changed(self, through: Through) -> Iterator[None]:
        members = {m: f for name, f in through.items() for m in self.members.get(name, (name,))}
        handles = [self._hook(name, f) for name, f in members.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, f: Callable[[Tensor], Tensor]) -> Any:
        """Let a function stand where a space's signal is read."""
        space = self.layout.spaces[name]
        if name == self.layout.points[-1]:
            module, before = self.model.get_submodule(self.layout.architecture.final_norm), True
        elif space.kind == "residual":
            edge = next(e for e in self.layout.edges if e.source == name)
            module, before = self._stage(edge), True
        else:
            edge = next(e for e in self.layout.edges if name in self.layout.inside(e))
            module, before = tap(self._stage(edge), space)
        if before:
            return module.register_forward_pre_hook(lambda _m, a: (f(a[0]), *a[1:]))
        return module.register_forward_hook(lambda _m, _a, y: f(y))

    def _stage(self, edge: Edge) -> Stage:
        found = self.model.get_submodule(edge.stage)
        assert isinstance(found, Stage)
        return found
