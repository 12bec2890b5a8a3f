"""All that one traced forward pass says: labels of tensors and weights, gains that wait, routers, rotary pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .arrays import core, unique_list, varies
from .ids import Ids, Mark
from .label import Label, Terms


@dataclass(frozen=True)
class Gain:
    """Where a factor of a coordinate stands: an element of a weight, plus a constant (Gemma's 1 + w)."""

    name: str
    index: int
    offset: float


@dataclass(frozen=True)
class Fold:
    """A gain that moves into a reader (power 1) or out of a bias (power -1)."""

    name: str
    index: int
    power: int


@dataclass(frozen=True)
class Router:
    """Ids of the scores that top-k chose from, and how many weights had been seen by then."""

    ids: tuple[int, ...]
    after: int


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint stores: parameters, and buffers such as a router's corrections; shared ones by their first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, t in model.state_dict(keep_vars=True).items():
        if t.is_floating_point():
            found.setdefault(id(t), (name, t))
    return dict(found.values())


class Record:
    """Labels of tensors, and what is known of the weights behind them."""

    def __init__(self, model: nn.Module, stacks: Collection[str] = ()) -> None:
        self.ids = Ids()
        self.stacks = frozenset(stacks)  # matrices that are taken row by row: stacks of vectors
        self.found_stacks: set[str] = set()
        self.names = {id(t): name for name, t in weights_of(model).items()}
        self.weights: dict[str, Label] = {}
        self.gains: dict[int, Gain] = {}  # id of a coordinate that waits for its gain to be folded
        self.broken: set[str] = set()  # gains that something else than a linear reader sees
        self.folds: dict[int, Fold] = {}  # id of a reader's or bias's coordinate
        self.reads: dict[
            int, Fold | None
        ] = {}  # id -> the gain behind which it was used, None for none
        self.contracted: set[int] = set()  # ids that something was contracted with
        self.turned: dict[tuple[int, int], None] = {}  # pairs that rotary positions turn together
        self.routers: list[Router] = []
        self.unknown: Counter[str] = Counter()  # ops that no rule understands
        self.origin: dict[
            int, list[tuple[int, float]]
        ] = {}  # id in a blank tensor -> what was written there
        self._products: dict[tuple, int] = {}
        self._labels: Any = WeakTensorKeyDictionary()

    # ---- labels of tensors

    def known(self, t: Any) -> bool:
        """Whether anything is known of a tensor (a blank one counts)."""
        return isinstance(t, Tensor) and (id(t) in self.names or t in self._labels)

    def raw(self, t: Any) -> Label | None:
        """The label as it was set, blank ones included."""
        return self._labels.get(t) if isinstance(t, Tensor) else None

    def get(self, t: Any) -> Label | None:
        """The label of a tensor that holds coordinates; None for constants."""
        if not isinstance(t, Tensor):
            return None
        label = self._labels.get(t)
        if label is None and id(t) in self.names:
            label = self.weight(t)
        if label is not None and label.blank:
            if not bool((t != 0).any()):
                return None
            label = self._written(label.fields[0])
        if label is None or not label.fields:
            return None
        if tuple(label.fields[0].shape) != tuple(t.shape):
            for f in label.fields:
                self.ids.freeze(f)
            return None
        return label

    def put(self, t: Any, label: Label | None) -> None:
        if isinstance(t, Tensor):
            if label is None:
                self._labels.pop(t, None)
            else:
                self._labels[t] = label

    def set(
        self,
        t: Any,
        fields: Iterable[Tensor],
        terms: Terms | None = None,
        squared: bool = False,
        parameter: tuple[str, float] | None = None,
    ) -> None:
        """A tensor holds these coordinates; fields that do not change are none."""
        if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
            return
        kept = tuple(f for f in fields if varies(f))
        self.put(t, Label(kept, terms, squared, parameter) if kept else None)

    # ---- products

    def coin(self, keys: Iterable[tuple]) -> tuple[Tensor, list[bool]]:
        """The id of each product, by what was multiplied, and whether it is new: a product met again is the same."""
        out, new = [], []
        for key in keys:
            new.append(key not in self._products)
            if new[-1]:
                self._products[key] = int(self.ids.new((1,)))
            out.append(self._products[key])
        return torch.tensor(out, dtype=torch.int64), new

    # ---- gains

    def use(self, a: int, fold: Fold | None) -> None:
        """A weight's id is used behind a gain, or without one; a gain that only some uses see cannot move into it."""
        if a in self.reads and self.reads[a] != fold:
            self.broken |= {f.name for f in (self.reads[a], fold) if f is not None}
        elif a not in self.reads:
            self.reads[a] = fold
            if fold is not None:
                self.folds[a] = fold

    # ---- weights

    def weight(self, t: Tensor, stacked: bool = True) -> Label:
        """New coordinates for a weight's axes; in a stack of matrices or vectors, each has its own.

        stacked: an array of three axes is a stack of matrices (experts), not the kernel of a convolution.
        """
        known = self._labels.get(t)
        if known is not None:
            return known
        name, shape, ids = self.names[id(t)], tuple(t.shape), self.ids
        dims = [d for d in range(len(shape)) if shape[d] > 1]
        stack = name in self.stacks or (stacked and len(dims) == 3)
        fields = []
        for d in dims:
            own = [
                shape[e] if e == d or (stack and e == dims[0] and e < d) else 1
                for e in range(len(shape))
            ]
            fields.append(ids.new(own).expand(shape))
        if stacked and len(dims) > 3:
            for f in fields:
                ids.freeze(f)
            fields = []
        if stack and fields:
            for e in range(shape[dims[0]]):
                node = int(core(fields[0].select(dims[0], e)).flatten()[0])
                for f in fields[1:]:
                    ids.link(node, unique_list(f.select(dims[0], e)))
            ids.mark(fields[0], Mark.NO_MIX | Mark.LEAD | Mark.NODE)
            ids.fix(fields[0])
        label = Label(tuple(fields), parameter=(name, 0.0))
        self.weights[name] = label
        self._labels[t] = label
        return label

    # ---- what was written to tensors made empty

    def _written(self, f: Tensor) -> Label:
        flat = f.reshape(-1).tolist()
        if not any(a in self.origin for a in flat):
            f = self._canonical(f)
            flat = f.reshape(-1).tolist()
        origins = [self.origin.get(a) for a in flat]
        if not any(origins):
            return Label((f,) if varies(f) else ())
        known: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for a, o in zip(flat, origins, strict=True):
            if o:
                known.setdefault(self.ids.scale(a), o)
        full = [
            o or known.get(self.ids.scale(a)) or [(a, 1.0)]
            for a, o in zip(flat, origins, strict=True)
        ]
        most = max(map(len, full))
        padded = [o + [(o[0][0], 0.0)] * (most - len(o)) for o in full]
        terms = tuple(
            (
                torch.tensor([o[k][0] for o in padded]).reshape(f.shape),
                torch.tensor([float(o[k][1]) for o in padded], dtype=torch.float64).reshape(
                    f.shape
                ),
            )
            for k in range(most)
        )
        first = terms[0][0]
        if not varies(first):
            return Label(())
        return Label((first,), terms=terms if most > 1 else None)

    def _canonical(self, f: Tensor) -> Tensor:
        """One id for all ids of one coordinate and scale."""
        u, inverse = torch.unique(f, return_inverse=True)
        first: dict[tuple[int, int], int] = {}
        ids = [first.setdefault(self.ids.scale(a), a) if a >= 0 else -1 for a in u.tolist()]
        return torch.tensor(ids)[inverse].reshape(f.shape)
