"""Moments: streaming second moments of the signal on each space, float64, mergeable, masked; their store on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ..core.errors import InvarianceError
from ..core.files import write_tensors
from ..core.space import Space
from ..model.layout import Layout
from ..model.modules import Factored
from .statistic import Statistic

SMALL = 128  # products of fewer columns are not divided further
Key = tuple[str, Statistic]


@dataclass
class Moment:
    """Σ w x xᵀ over the tokens seen, or Σ w x for a MEAN (float64, one a copy), and Σ w: how many, where all weigh 1."""

    total: Float64[Tensor, "c d *d"]
    count: float

    @property
    def mean(self) -> Float64[Tensor, "c d *d"]:
        return self.total / (self.count or 1.0)

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.total + other.total, self.count + other.count)


@dataclass
class Moments:
    """What is known of every space: the sufficient statistics from which rotators and slicers work."""

    known: dict[Key, Moment] = field(default_factory=dict)

    def second(self, space: Space, of: str | Statistic = Statistic.RAW) -> Float64[Tensor, "c d d"]:
        """E[x xᵀ] of a space: ``raw``, ``normed`` or ``seen``; Σ WᵀW of its ``readers``; or its ``fisher``.

        Raises KeyError when the method did not ask for that statistic in ``needs``.
        """
        return self.known[space.name, Statistic(of).on(space)].mean

    def mean(self, space: Space) -> Float64[Tensor, "c d"]:
        """E[x] of a space; over the heads too that share a copy. Raises KeyError as ``second`` does."""
        return self.known[space.name, Statistic.MEAN].mean

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
        total = runs.sum(1, dtype=torch.float64) / r if key[1] is Statistic.MEAN else outer(runs)
        self._take(key, total, count)

    def compare(self, key: Key, x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> None:
        """Take in the cosines of n pairs of tokens, as a moment of one dim."""
        total = torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).double().sum()
        self._take(key, total.reshape(1, 1, 1), len(x))

    def _take(self, key: Key, total: Float[Tensor, "c d *d"], count: float) -> None:
        """Take in the sum of a batch, in place: matrices of all channels are large, and batches many."""
        known = self.known.setdefault(key, Moment(torch.zeros_like(total, dtype=torch.float64), 0))
        known.total += total
        known.count += count

    def cpu(self) -> Moments:
        """The same on the CPU, where bases are fitted and changes made whatever device the model is on."""
        return Moments({key: Moment(m.total.cpu(), m.count) for key, m in self.known.items()})

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of tokens together; nothing is lost by splitting them."""
        merged = dict(self.known)
        for key, moment in other.known.items():
            merged[key] = merged[key] + moment if key in merged else moment
        return Moments(merged)

    def beside(self, members: Iterable[str], into: str) -> Moments:
        """The moments of several spaces as those of one space ``into`` that has all their copies."""
        names = list(members)
        found: dict[Key, Moment] = {}
        for statistic in {s for name, s in self.known if name in names}:
            each = [self.known[name, statistic] for name in names]
            found[into, statistic] = Moment(torch.cat([m.total for m in each]), each[0].count)
        return Moments(found)

    def pooled(self, members: Iterable[str], into: str) -> Moments:
        """The moments of several spaces that share one basis, as those of the space ``into``."""
        pooled: dict[Key, Moment] = {}
        for (name, statistic), moment in self.known.items():
            if name in set(members):
                key = (into, statistic)
                pooled[key] = pooled[key] + moment if key in pooled else moment
        return Moments(pooled)


def outer(x: Float[Tensor, "c n d"]) -> Float[Tensor, "c d d"]:
    """Σ x xᵀ per copy of one batch; batches are added in float64. bfloat16 signals are multiplied by the fast bfloat16
    units, exactly: their products are exact in float32, in which the sums are taken."""
    with _exact_fast_products(x.dtype is torch.bfloat16):
        f = (x if x.dtype is torch.float64 else x.float()).detach()
        total = f.new_empty(len(f), f.shape[-1], f.shape[-1])
        for m, out in zip(
            f, total, strict=True
        ):  # one by one: batched products are half as fast on CPUs
            _gram(m, out)
        return total


def _gram(x: Float[Tensor, "n d"], out: Float[Tensor, "d d"]) -> None:
    """Xᵀ X. It is symmetric: of its four quarters, one is another's transpose and is not multiplied; so on inside them."""
    h = x.shape[1] // 2
    if h < SMALL:
        torch.mm(x.mT, x, out=out)
        return
    torch.mm(x[:, :h].mT, x[:, h:], out=out[:h, h:])
    out[h:, :h] = out[:h, h:].mT
    _gram(x[:, :h], out[:h, :h])
    _gram(x[:, h:], out[h:, h:])


@contextmanager
def _exact_fast_products(allowed: bool) -> Iterator[None]:
    """Let float32 products round their FACTORS to bfloat16 or TF32: no loss when the factors are bfloat16 already."""
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision, cuda.fp32_precision
    try:
        cpu.fp32_precision, cuda.fp32_precision = ("bf16", "tf32") if allowed else ("ieee", "ieee")
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before


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


@torch.no_grad()
def reader_moment(model: PreTrainedModel, layout: Layout, space: Space) -> Moment:
    """Σ WᵀW over the weights that read a space, per copy: how much each direction weighs with its readers.

    Heads that share a copy of it count as one of them does on average, since moments of the signal add up over them.
    """
    total = torch.zeros(space.copies, space.seen, space.seen, dtype=torch.float64)
    for name, i in layout.readers(space.name):
        W = reader(model, space, name).movedim(i, -1).flatten(0, -2)
        runs = W.shape[-1] // (space.copies * space.seen)
        total += outer(rearrange(W, "n (c r d) -> c (n r) d", c=space.copies, d=space.seen)) / runs
    return Moment(total, 1)


def reader(model: PreTrainedModel, space: Space, name: str) -> Float64[Tensor, "o i"]:
    """A weight that reads a space; the product, where it is one of two factors and the space lies beyond them."""
    parent = model.get_submodule(name.rsplit(".", 2)[0])
    if isinstance(parent, Factored) and space.kind != "edge":
        return (parent.second.weight.double() @ parent.first.weight.double()).cpu()
    return model.get_parameter(name).double().cpu()


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
        """Those of the moments that are stored; a file that cannot be read counts as missing."""
        found = {}
        for key in keys:
            try:
                tensors = load_file(self._path(key))
                found[key] = Moment(tensors["total"], tensors["count"].item())
            except (OSError, KeyError, SafetensorError):
                continue
        return Moments(found)

    def save(self, moments: Moments) -> None:
        """Each file to a temporary name and then into place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for key, moment in moments.known.items():
            if key[1] is not Statistic.READERS:
                write_tensors(
                    self._path(key),
                    {
                        "total": moment.total,
                        "count": torch.tensor(moment.count, dtype=torch.float64),
                    },
                )


def check_finite(moments: Moments) -> None:
    """Raises InvarianceError when a signal overflowed or was not a number."""
    for (name, _), moment in moments.known.items():
        if not torch.isfinite(moment.total).all():
            raise InvarianceError(
                f"the signal on space '{name}' is not finite: the model overflows on these tokens. "
                "Calibrate in float32 (calibrate.dtype: float32), or look at the tokens."
            )
