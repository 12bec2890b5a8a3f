"""The output-KL Fisher: what errors of a signal, or queries without some dims, cost in nats, from gradients of sampled labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from einops import rearrange
from torch import Tensor

from ..core.progress import Progress, quiet
from ..core.space import Space
from ..io.data import Tokens
from ..model.axes import Edge
from ..model.layout import Layout
from ..model.modules import Stage
from ..model.working import Stages
from .backward import backward
from .moment import Gram, Known, Weights
from .moments import Moments, readers, real_tokens
from .statistic import Statistic

SEQUENCES = 8  # by default, the first of the calibration tokens; each tells as many gradients as it has tokens
SEED = 0  # of the labels


@dataclass(frozen=True)
class Part:
    """Which tokens are measured: the first ``sequences`` (None: ``SEQUENCES``), each without its first ``skip`` tokens."""

    sequences: int | None = None
    skip: int = 0


def measure(
    parts: Stages,
    points: Iterable[str],
    tokens: Tokens,
    progress: Progress = quiet,
    *,
    queries: Iterable[str] = (),
    seed: int = SEED,
    part: Part = Part(),
) -> Moments:
    """FISHER, E[g gᵀ], at points of the stream or where branches write (``Edge.written``).

    g = ∂/∂x_t Σ_s log p(y_s), with a label y_s ~ p drawn for every real token s.

    The labels are the model's own, so E[g] = 0, their cross terms vanish, and E[g gᵀ] = Σ_s J_stᵀ F_s J_st, with J_st
    the derivative of the logits at s by x_t and F_s the softmax's Fisher: errors e_t of mean 0, uncorrelated between
    tokens, cost ½ E[eᵀ F e] nats of KL a token, to second order. Stages are passed back one by one (``backward``).

    TAYLOR, E[m mᵀ] with m = Σ_h q_h ∘ ∂/∂q_h Σ_s log p(y_s) over the query heads h that share a KV head, for the query/key
    spaces ``queries``: the queries of a token without the dims S err by −q_S, which costs ½ E[(Σ_{j∈S} m_j)²] nats a token,
    to second order and with other tokens' queries whole. Turning by positions leaves q_j g_j of a pair's two dims
    together as it is.

    It reads ``part`` of the tokens; what it skips passes the model, and no moment sees it.

    Source: Martens 2020, arXiv:1412.1193: the true Fisher, by labels that the model itself draws; Theis et al. 2018,
    arXiv:1801.05787, equation 8, for what is left out.
    """
    layout = parts.layout
    signals = _Signals(layout, {*points}, {layout.attention(n): n for n in queries})
    some = slice(part.sequences or SEQUENCES)
    few = Tokens(tokens.ids[some], tokens.mask[some])
    backward(parts, few, signals.taps, signals.take, skip=part.skip, seed=seed, progress=progress)
    return signals.moments.cpu()


@dataclass(frozen=True)
class _Signals:
    """What is tapped on the way through a stage, and the moments of its gradients on the way back."""

    layout: Layout
    points: set[str]  # whose gradients give FISHER
    queries: Mapping[
        str, str
    ]  # an attention's path → its query/key space, whose gradients give TAYLOR
    moments: Moments = field(default_factory=Moments)

    @contextmanager
    def taps(self, edge: Edge, stage: Stage) -> Iterator[dict[str, Tensor]]:
        """The signals inside a stage that gradients are taken by, while it computes: those that its branches write before
        a norm, and its queries."""
        found: dict[str, Tensor] = {}
        handles = []
        if edge.post and edge.written in self.points:
            assert stage.post is not None
            handles.append(stage.post.register_forward_pre_hook(_keep(found, edge.written)))
        if (name := self.queries.get(f"{edge.stage}.attention")) is not None:
            assert stage.attention is not None
            hook = _keep(found, name)
            handles.append(
                stage.attention.q.register_forward_hook(lambda m, _, y: hook(m, (y,))[0])
            )
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def take(self, name: str, x: Tensor, gradient: Tensor, seen: Tensor) -> None:
        """Add a signal and its gradient to the moments."""
        if name in self.points:
            self.moments.add((name, Statistic.FISHER), real_tokens(gradient, seen))
        elif name in self.queries.values():
            copies, d = self.layout.spaces[name].copies, self.layout.spaces[name].dim
            m = rearrange(gradient * x, "b t (c r d) -> b t c r d", c=copies, d=d)
            summed = real_tokens(m.sum(-2).flatten(-2), seen)
            self.moments.add((name, Statistic.TAYLOR), summed, copies, copies)


def _keep(found: dict[str, Tensor], name: str) -> Callable[..., tuple[Any, ...]]:
    """A hook that keeps what passes, to be differentiated by."""

    def keep(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        found[name] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return (found[name], *args[1:])

    return keep


def moment(parts: Stages, space: Space, known: Moments) -> Known:
    """The Fisher of a space, per copy: a point's own; of a space inside a stage Σ Wᵀ F W over the weights W that read
    it, F that of where they write. Raises KeyError where F was not measured."""
    if space.kind == "residual":
        return known.known[space.name, Statistic.FISHER]
    behind = parts.layout.written_behind(space.name)
    fishers = [known.known[point, Statistic.FISHER] for point in behind]

    def weights() -> Weights:
        for (W, i), F in zip(readers(parts, space), fishers, strict=True):
            yield W.movedim(i, -1), F.mean[0]

    return Gram(space.copies, space.seen, weights)
