"""Moments: streaming second moments of the signal on each space, float64, mergeable, masked; their store on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ..core.errors import InvarianceError
from ..core.operator import Operator
from ..core.sealed import read_kept, write_kept
from ..core.space import Space
from ..model.layout import Layout
from ..model.modules import Factored
from ..model.working import Stages
from .moment import Gram, Known, Moment, Weights
from .outer import add_outer
from .statistic import Statistic

Key = tuple[str, Statistic]


@dataclass
class Moments:
    """What is known of every space: the sufficient statistics from which rotators and slicers work.

    ``layout`` says which model's spaces they are; with it, spaces may be asked for by name.
    """

    known: dict[Key, Known] = field(default_factory=dict)
    layout: Layout | None = None

    def second(
        self, space: Space | str, of: str | Statistic = Statistic.RAW
    ) -> Float64[Tensor, "c d d"]:
        """E[x xᵀ] of a space: ``raw``, ``normed`` or ``seen``; Σ WᵀW of its ``readers``; or its ``fisher``.

        A tensor that belongs to who asks: of many channels it is large, so better compute in it than beside it.
        Raises KeyError when the method did not ask for that statistic in ``needs``.
        """
        return self._of(space, of).mean

    def diagonal(
        self, space: Space | str, of: str | Statistic = Statistic.RAW
    ) -> Float64[Tensor, "c d"]:
        """The diagonal of ``second``, which is not computed for it."""
        return self._of(space, of).blocks(1).flatten(1)

    def blocks(
        self, space: Space, of: str | Statistic = Statistic.RAW
    ) -> Float64[Tensor, "c d g g"]:
        """The blocks of ``second`` that belong to one direction each, where its grain is g."""
        return self._of(space, of).blocks(space.grain)

    def times(
        self, space: Space | str, of: str | Statistic, X: Operator
    ) -> Float64[Tensor, "c d k"]:
        """``second`` of the signal times X, without a copy of it."""
        found = self._of(space, of)
        return found.times(X) if isinstance(found, Moment) else found.mean @ X

    def _of(self, space: Space | str, of: str | Statistic) -> Known:
        found = self._space(space)
        return self.known[found.name, Statistic(of).on(found)]

    def _space(self, space: Space | str) -> Space:
        if isinstance(space, Space):
            return space
        if self.layout is None:
            raise KeyError(f"moments without a layout know no space by the name '{space}'")
        return self.layout.spaces[space]

    def mean(self, space: Space | str) -> Float64[Tensor, "c d"]:
        """E[x] of a space; over the heads too that share a copy. Raises KeyError as ``second`` does."""
        return self.known[self._space(space).name, Statistic.MEAN].mean

    def add(
        self,
        key: Key,
        x: Float[Tensor, "n cd"],
        copies: int = 1,
        heads: int = 1,
        weights: Float[Tensor, "n 1"] | None = None,
    ) -> None:
        """Take in n tokens of a signal whose last axis holds ``heads`` runs of d, neighbours sharing a copy."""
        count: float = len(x)
        if weights is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            x, count = (x.to(wide) * weights.sqrt()).to(x.dtype), weights.double().sum().item()
        r = heads // copies
        runs = rearrange(x, "n (c r d) -> c (n r) d", c=copies, r=r)
        if key[1] is Statistic.MEAN:
            self._take(key, runs.sum(1, dtype=torch.float64) / r, count)
            return
        known = self._taken(key, (len(runs), runs.shape[-1], runs.shape[-1]), x.device)
        add_outer(runs, known.total)
        known.count += count

    def compare(self, key: Key, x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> None:
        """Take in the cosines of n pairs of tokens, as a moment of one dim."""
        total = torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).double().sum()
        self._take(key, total.reshape(1, 1, 1), len(x))

    def _take(self, key: Key, total: Float[Tensor, "c d *d"], count: float) -> None:
        """Take in the sum of a batch."""
        known = self._taken(key, total.shape, total.device)
        known.total += total
        known.count += count

    def _taken(self, key: Key, shape: Sequence[int], device: torch.device) -> Moment:
        """What was taken in so far, in place: matrices of all channels are large, and batches many."""
        if key not in self.known:
            empty = torch.zeros(*shape, dtype=torch.float64, device=device)
            self.known[key] = Moment(empty, 0)
        return cast(Moment, self.known[key])

    def cpu(self) -> Moments:
        """The same on the CPU, where bases are fitted and changes made whatever device the model is on."""
        return Moments({key: Moment(m.total.cpu(), m.count) for key, m in self.known.items()})

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of tokens together; nothing is lost by splitting them."""
        merged = dict(self.known)
        for key, moment in other.known.items():
            merged[key] = merged[key] + moment if key in merged else moment
        return Moments(merged, self.layout or other.layout)

    def beside(self, members: Iterable[str], into: str) -> Moments:
        """The moments of several spaces as those of one space ``into`` that has all their copies."""
        names = list(members)
        found: dict[Key, Known] = {}
        for statistic in {s for name, s in self.known if name in names}:
            each = [self.known[name, statistic] for name in names]
            found[into, statistic] = Moment(torch.cat([m.total for m in each]), each[0].count)
        return Moments(found)

    def pooled(self, members: Iterable[str], into: str) -> Moments:
        """The moments of several spaces that share one basis, as those of the space ``into``."""
        pooled: dict[Key, Known] = {}
        for (name, statistic), moment in self.known.items():
            if name in set(members):
                key = (into, statistic)
                pooled[key] = pooled[key] + moment if key in pooled else moment
        return Moments(pooled)


def weights(behind: Float[Tensor, "*n d"]) -> Float[Tensor, "*n 1"]:
    """What each token counts by: 1/mean(y²) of what the next norm divides by: the stream behind a stage, or what a
    branch gives to the norm behind it."""
    wide = torch.promote_types(behind.dtype, torch.float32)
    return 1 / behind.to(wide).square().mean(-1, keepdim=True).clamp_min(1e-12)


def real_tokens(
    x: Float[Tensor, "B T d"], mask: Bool[Tensor, "B T"] | None
) -> Float[Tensor, "n d"]:
    """The rows of a batch that are no padding."""
    return x.flatten(0, 1) if mask is None or bool(mask.all()) else x[mask.to(x.device)]


def reader_moment(parts: Stages, space: Space) -> Gram:
    """Σ WᵀW over the weights that read a space, per copy: how much each direction weighs with its readers."""

    def weights() -> Weights:
        for W, i in readers(parts, space):
            yield W.movedim(i, -1).flatten(0, -2), None

    return Gram(space.copies, space.seen, weights)


def readers(parts: Stages, space: Space) -> Iterator[tuple[Float[Tensor, "o i"], int]]:
    """The weights that read a space, each with its axis that does; products of two factors, where the space lies beyond
    them. The head comes by rows."""
    for name, i in parts.layout.readers(space.name):
        edge = next((e for e in parts.layout.edges if name.startswith(f"{e.stage}.")), None)
        if edge is None:
            for W in parts.end(name):
                yield W.cpu(), i
            continue
        inside = name.removeprefix(f"{edge.stage}.").removesuffix(".weight")
        stage = parts.peek(edge, [inside])
        pair = stage.get_submodule(inside.rpartition(".")[0])
        if isinstance(pair, Factored) and space.kind != "edge":
            yield (pair.second.weight.double() @ pair.first.weight.double()).detach().cpu(), i
        else:
            yield stage.get_parameter(f"{inside}.weight").detach().cpu(), i


@dataclass(frozen=True)
class Store:
    """Moments on disk, one file a space and statistic, under a folder named by what they were measured on."""

    folder: Path

    @classmethod
    def keyed(cls, root: Path, identity: Mapping[str, str]) -> Store:
        """``identity`` says what determines the moments: weights, tokens, canonical form, dtype."""
        digest = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()
        return cls(root / digest[:32])

    def _path(self, key: Key) -> Path:
        return self.folder / f"{key[0]}.{key[1].value}.safetensors"

    def load(self, keys: Iterable[Key]) -> Moments:
        """Those of the moments that are stored; a file that is not as it was written counts as missing."""
        found: dict[Key, Known] = {}
        for key in keys:
            if (tensors := read_kept(self._path(key))) is not None:
                found[key] = Moment(tensors["total"], tensors["count"].item())
        return Moments(found)

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Those of the keys that ``load`` would not find."""
        return [key for key in keys if key not in self.load([key]).known]

    def save(self, moments: Moments) -> None:
        """Each file to a temporary name and then into place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for key, moment in moments.known.items():
            if key[1] is not Statistic.READERS:
                write_kept(
                    self._path(key),
                    {
                        "total": moment.total,
                        "count": torch.tensor(moment.count, dtype=torch.float64),
                    },
                )


@dataclass
class Shelf:
    """Moments as they are measured: in a store where there is one, else in memory."""

    store: Store | None
    writes: bool = True  # of several processes only one does
    held: Moments = field(default_factory=Moments)

    def put(self, moments: Moments) -> None:
        check_finite(moments)
        if self.store is None:
            self.held = self.held.merge(moments)
        elif self.writes:
            self.store.save(moments)

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        if self.store is None:
            return [key for key in keys if key not in self.held.known]
        return self.store.missing(keys)

    def get(self, keys: Iterable[Key]) -> Moments:
        """Those of the keys that are there."""
        if self.store is not None:
            return self.store.load(keys)
        return Moments({key: self.held.known[key] for key in keys if key in self.held.known})


def check_finite(moments: Moments) -> None:
    """Raises InvarianceError when a signal overflowed or was not a number."""
    for (name, _), moment in moments.known.items():
        if not torch.isfinite(moment.total).all():
            raise InvarianceError(
                f"the signal on space '{name}' is not finite: the model overflows on these tokens. "
                "Calibrate in float32 (calibrate.dtype: float32), or look at the tokens."
            )
