"""Probes of a stage: hooks that measure the signals on its spaces while batches pass it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..core.space import Space
from ..model.layout import Layout
from ..model.modules import Factored, Stage
from .moments import Moments, real_tokens, weights
from .statistic import Statistic, Wanted


@dataclass
class Probe:
    """Measures a batch while it passes a stage."""

    moments: Moments
    mask: Tensor | None = None  # of the batch that passes now
    seen: list[tuple[Space, Tensor, int]] = field(
        default_factory=list
    )  # what waits for its tokens' weights

    def add(
        self, space: Space, statistics: frozenset[Statistic], signal: Tensor, heads: int
    ) -> None:
        for statistic in statistics:
            if statistic is Statistic.WEIGHTED:
                self.seen.append((space, signal, heads))
            else:
                x = real_tokens(signal, self.mask)
                self.moments.add((space.name, statistic), x, space.copies, heads)

    def leave(self, given: Tensor) -> None:
        """The batch has left the stage, and its tokens weigh by what was ``given`` there (``Left``)."""
        w = real_tokens(weights(given), self.mask)
        for space, signal, heads in self.seen:
            x = real_tokens(signal, self.mask)
            self.moments.add((space.name, Statistic.WEIGHTED), x, space.copies, heads, w)
        self.seen.clear()


def tap(stage: Stage, space: Space) -> tuple[nn.Module, bool]:
    """The module inside a stage that a space's signal enters, as what it reads (True), or leaves."""
    if space.kind == "edge":
        assert space.part is not None
        factored = stage.linears()[space.part]
        assert isinstance(factored, Factored)
        return factored.first, False
    if space.kind == "mlp":
        assert stage.mlp is not None
        return stage.mlp.down, True
    assert stage.attention is not None
    return (stage.attention.k, False) if space.kind == "qk" else (stage.attention.out, True)


def add_stream(
    moments: Moments,
    point: str,
    statistics: frozenset[Statistic],
    x: Tensor,
    normed: Tensor,
    mask: Tensor | None,
) -> None:
    for statistic, signal in ((Statistic.RAW, x), (Statistic.MEAN, x), (Statistic.NORMED, normed)):
        if statistic in statistics:
            moments.add((point, statistic), real_tokens(signal, mask))
    if Statistic.WEIGHTED in statistics:
        moments.add(
            (point, Statistic.WEIGHTED), real_tokens(x, mask), weights=real_tokens(weights(x), mask)
        )


@contextmanager
def probes(
    moments: Moments, layout: Layout, spaces: list[str], stage: Stage, wanted: Wanted
) -> Iterator[Probe]:
    """Measure signals inside a stage while it runs: the stream at its norm, outputs of q, k, first factors, what readers read."""
    probe = Probe(moments)
    handles = []
    for name in spaces:
        statistics = wanted.get(name, frozenset())
        if not statistics:
            continue
        space = layout.spaces[name]

        def stream(
            _: Any, args: Any, out: Tensor, name: str = name, which: Any = statistics
        ) -> None:
            add_stream(moments, name, which, args[0], out, probe.mask)

        def add(
            signal: Tensor,
            space: Any = space,
            heads: int = space.copies,
            which: Any = statistics,
            queries: bool = False,
        ) -> None:
            asked = {Statistic.QUERIES} & which if queries else which - {Statistic.QUERIES}
            probe.add(space, asked, signal, heads)

        if space.kind == "residual":
            assert stage.norm is not None
            handles.append(stage.norm.register_forward_hook(stream))
            continue
        module, before = tap(stage, space)
        if before:
            attention = stage.attention
            heads = (
                attention.heads if space.kind == "vo" and attention is not None else space.copies
            )
            hook = lambda _m, a, add=add, heads=heads: add(a[0], heads=heads)  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        else:
            handles.append(module.register_forward_hook(lambda _m, _a, y, add=add: add(y)))
        if space.kind == "qk":
            assert stage.attention is not None
            heads = stage.attention.heads
            ask = lambda _m, _a, y, add=add, heads=heads: add(y, heads=heads, queries=True)  # noqa: E731
            handles.append(stage.attention.q.register_forward_hook(ask))
    try:
        yield probe
    finally:
        for handle in handles:
            handle.remove()
