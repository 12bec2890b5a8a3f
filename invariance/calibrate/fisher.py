"""The output-KL Fisher: what errors of a signal, or queries without some dims, cost in nats, from gradients of sampled labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..core.progress import Progress, quiet
from ..core.space import Space
from ..io.data import Tokens
from ..model.layout import Layout
from ..model.verify import copy_in
from .moment import Gram, Known, Weights
from .moments import Moments, reader, real_tokens
from .statistic import Statistic

SEQUENCES = (
    8  # the first of the calibration tokens; a sequence tells as many gradients as it has tokens
)
SEED = 0  # of the labels


def measure(
    model: PreTrainedModel,
    layout: Layout,
    points: Iterable[str],
    tokens: Tokens,
    progress: Progress = quiet,
    *,
    queries: Iterable[str] = (),
    seed: int = SEED,
    skip: int = 0,
) -> Moments:
    """FISHER, E[g gᵀ], at points of the stream or where branches write (``Edge.written``).

    g = ∂/∂x_t Σ_s log p(y_s), with a label y_s ~ p drawn for every real token s.

    The labels are the model's own, so E[g] = 0, their cross terms vanish, and E[g gᵀ] = Σ_s J_stᵀ F_s J_st, with J_st
    the derivative of the logits at s by x_t and F_s the softmax's Fisher: errors e_t of mean 0, uncorrelated between
    tokens, cost ½ E[eᵀ F e] nats of KL a token, to second order. One backward pass a sequence, in float32 (bfloat16's
    are slow on CPUs).

    TAYLOR, E[m mᵀ] with m = Σ_h q_h ∘ ∂/∂q_h Σ_s log p(y_s) over the query heads h that share a KV head, for the query/key
    spaces ``queries``: the queries of a token without the dims S err by −q_S, which costs ½ E[(Σ_{j∈S} m_j)²] nats a token,
    to second order and with other tokens' queries whole. Turning by positions leaves q_j g_j of a pair's two dims
    together as it is.

    The first ``skip`` tokens of a sequence pass the model, and no moment sees them.

    Source: Martens 2020, arXiv:1412.1193: the true Fisher, by labels that the model itself draws; Theis et al. 2018,
    arXiv:1801.05787, equation 8, for what is left out.
    """
    points, queries = list(points), list(queries)
    twin = copy_in(torch.float32, model).requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    moments = Moments()
    sequences = list(Tokens(tokens.ids[:SEQUENCES], tokens.mask[:SEQUENCES]).batches(1))
    with _signals(twin, layout, points) as signals, _queries(twin, layout, queries) as asked:
        for ids, real in progress(sequences, "measure the Fisher", len(sequences)):
            seen = real.clone()
            seen[:, :skip] = False
            gradients = score(
                twin,
                ids,
                real,
                g,
                lambda: [*(signals[p] for p in points), *(asked[n] for n in queries)],
            )
            for point, gradient in zip(points, gradients, strict=False):
                moments.add((point, Statistic.FISHER), real_tokens(gradient, seen))
            for name, gradient in zip(queries, gradients[len(points) :], strict=True):
                copies = layout.spaces[name].copies
                m = rearrange(
                    gradient * asked[name].detach(),
                    "b t (c r d) -> b t c r d",
                    c=copies,
                    d=layout.spaces[name].dim,
                )
                moments.add(
                    (name, Statistic.TAYLOR),
                    real_tokens(m.sum(-2).flatten(-2), seen),
                    copies,
                    copies,
                )
    return moments.cpu()


def score(
    model: PreTrainedModel,
    ids: Int[Tensor, "B T"],
    real: Bool[Tensor, "B T"],
    g: torch.Generator,
    signals: Callable[[], list[Tensor]],
) -> tuple[Tensor, ...]:
    """∂/∂x Σ_s log p(y_s) for signals x of the model, known once it ran, with a label y_s ~ p for every real token s."""
    padded = None if bool(real.all()) else real.long().to(model.device)
    with torch.enable_grad():
        logits = model(
            input_ids=ids.to(model.device), attention_mask=padded, use_cache=False
        ).logits
        logits = real_tokens(logits, real)
        p = logits.detach().softmax(-1)
        labels = sample(p, g)
        by_logits = p.neg_().scatter_add_(-1, labels[:, None], torch.ones_like(p[:, :1]))  # 1_y − p
        return torch.autograd.grad(logits, signals(), by_logits)


def sample(p: Float[Tensor, "n V"], g: torch.Generator) -> Int[Tensor, " n"]:
    """A label from each distribution, by its inverse distribution function."""
    distribution = p.cumsum(-1, dtype=torch.float64)
    u = torch.rand(len(p), 1, generator=g, dtype=torch.float64).to(p.device)
    found = torch.searchsorted(distribution, u * distribution[..., -1:], right=True)
    return found.squeeze(-1).clamp_max(p.shape[-1] - 1)


@contextmanager
def _signals(
    model: PreTrainedModel, layout: Layout, points: list[str]
) -> Iterator[dict[str, Tensor]]:
    """What arrives at points of the stream, or at norms behind branches, when the model runs, ready to be
    differentiated by."""
    signals: dict[str, Tensor] = {}
    readers = {e.source: e.stage for e in layout.edges} | {
        layout.points[-1]: layout.architecture.final_norm
    }
    readers |= {e.written: f"{e.stage}.post" for e in layout.edges if e.post}

    def keep(point: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        signals[point] = x
        return (x, *args[1:])

    handles = [
        model.get_submodule(readers[p]).register_forward_pre_hook(
            lambda _, args, p=p: keep(p, args)
        )
        for p in points
    ]
    try:
        yield signals
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _queries(
    model: PreTrainedModel, layout: Layout, names: list[str]
) -> Iterator[dict[str, Tensor]]:
    """The queries of spaces when the model runs, ready to be differentiated by."""
    found: dict[str, Tensor] = {}

    def keep(name: str, q: Tensor) -> Tensor:
        found[name] = q if q.requires_grad else q.detach().requires_grad_()
        return found[name]

    handles = [
        model.get_submodule(f"{layout.attention(n)}.q").register_forward_hook(
            lambda _m, _a, q, n=n: keep(n, q)
        )
        for n in names
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def moment(model: PreTrainedModel, layout: Layout, space: Space, known: Moments) -> Known:
    """The Fisher of a space, per copy: a point's own; of a space inside a stage Σ Wᵀ F W over the weights W that read
    it, F that of where they write. Raises KeyError where F was not measured."""
    if space.kind == "residual":
        return known.known[space.name, Statistic.FISHER]
    readers, behind = layout.readers(space.name), layout.written_behind(space.name)
    fishers = [known.known[point, Statistic.FISHER] for point in behind]

    def weights() -> Weights:
        for (name, i), F in zip(readers, fishers, strict=True):
            yield reader(model, space, name).movedim(i, -1), F.mean[0]

    return Gram(space.copies, space.seen, weights)
