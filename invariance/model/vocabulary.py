"""A vocabulary whose last tokens, the rare ones, share few directions: a table and a head that store those rows as factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

LEAVES = ("common", "rare", "basis")
Factors = tuple[Tensor, Tensor, Tensor]
"""``common`` (n, d), ``rare`` (V − n, r), ``basis`` (r, d)."""


class Ends(Protocol):
    """Where the tables and the head of a model lie, as ``Architecture`` says it."""

    @property
    def embed(self) -> tuple[str, ...]: ...
    @property
    def head(self) -> str: ...
    @property
    def scaled(self) -> bool: ...


class Rows(nn.Module):
    """A matrix (V, d) whose first rows are ``common`` (n, d), and whose others are ``rare`` (V − n, r) @ ``basis`` (r, d).

    Byte-pair vocabularies list tokens in the order in which they were merged, so the last ones are the rarest. Factors by
    frequency: Chen et al., GroupReduce (arXiv:1806.06950).
    """

    def __init__(self, common: nn.Parameter, rare: nn.Parameter, basis: nn.Parameter) -> None:
        super().__init__()
        self.common, self.rare, self.basis = common, rare, basis

    @property
    def weight(self) -> Tensor:
        """All rows as one matrix, made when it is asked for."""
        return torch.cat((self.common, self.rare @ self.basis))

    @property
    def in_features(self) -> int:
        return self.common.shape[1]

    def extra_repr(self) -> str:
        n, d = self.common.shape
        return f"{n + len(self.rare)}, {d}, common={n}, rank={len(self.basis)}"


class Table(Rows):
    """Looks tokens up; what it finds is multiplied by ``scale``, rounded to the dtype as families do that have one."""

    def __init__(
        self, common: nn.Parameter, rare: nn.Parameter, basis: nn.Parameter, scale: float = 1.0
    ) -> None:
        super().__init__(common, rare, basis)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        n = len(self.common)
        rare = F.embedding((ids - n).clamp_min(0), self.rare) @ self.basis
        found = torch.where(
            (ids < n)[..., None], F.embedding(ids.clamp_max(n - 1), self.common), rare
        )
        return found if self.scale == 1.0 else found * torch.tensor(self.scale, dtype=found.dtype)


class Head(Rows):
    """Makes logits: x ↦ W x + b, the rare ones by way of the factors."""

    def __init__(
        self,
        common: nn.Parameter,
        rare: nn.Parameter,
        basis: nn.Parameter,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__(common, rare, basis)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rare = F.linear(F.linear(x, self.basis), self.rare)
        logits = torch.cat((F.linear(x, self.common), rare), -1)
        return logits if self.bias is None else logits + self.bias


@dataclass(frozen=True)
class Shape:
    """How a vocabulary is stored: ``common`` first rows of their own, the others of ``rank`` directions."""

    common: int
    rank: int

    def numbers(self, vocabulary: int, width: int) -> int:
        """How many numbers a table of so many rows stores."""
        return self.common * width + (vocabulary - self.common + width) * self.rank


def factored(model: PreTrainedModel, arch: Ends) -> Shape | None:
    """How a model's vocabulary is stored, where it is two factors."""
    table = model.get_submodule(arch.embed[0])
    return Shape(len(table.common), len(table.basis)) if isinstance(table, Rows) else None


def install(
    model: PreTrainedModel, arch: Ends, table: Factors, head: Factors | None = None
) -> None:
    """Put factors in the place of the table, and in the head's: the same ones, tied, where it has none of its own."""
    before, read = model.get_submodule(arch.embed[0]), model.get_submodule(arch.head)
    grad = next(before.parameters()).requires_grad
    own = Rows(*(nn.Parameter(part, requires_grad=grad) for part in table))
    other = own if head is None else Rows(*(nn.Parameter(part, grad) for part in head))
    bias = read.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    scale = scale_of(before) if arch.scaled else 1.0
    made = Table(own.common, own.rare, own.basis, scale)
    model.set_submodule(arch.embed[0], made.train(before.training))
    reader = Head(other.common, other.rare, other.basis, bias)
    model.set_submodule(arch.head, reader.train(read.training))
    names = {f"{arch.head}.{leaf}": f"{arch.embed[0]}.{leaf}" for leaf in LEAVES}
    model._tied_weights_keys = model.all_tied_weights_keys = names if head is None else {}


def install_blank(model: PreTrainedModel, arch: Ends, shape: Shape) -> None:
    """The same without numbers, of the widths that the table and the head have."""
    table, head = model.get_submodule(arch.embed[0]), model.get_submodule(arch.head)
    own = None if is_tied(table, head) else _blank(head, shape)
    install(model, arch, _blank(table, shape), own)


def scale_of(table: nn.Module) -> float:
    """The number that a scaled table keeps, by which it multiplies its rows; 1 where it keeps none."""
    plain = vars(nn.Embedding(1, 1))
    kept = (v for k, v in vars(table).items() if isinstance(v, float) and k not in plain)
    return next(kept, 1.0)


def is_tied(table: nn.Module, head: nn.Module) -> bool:
    """Whether a head multiplies by the table's own numbers."""
    if isinstance(table, Rows) and isinstance(head, Rows):
        return head.common is table.common
    return getattr(head, "weight", None) is getattr(table, "weight", 0)


def tie(model: PreTrainedModel, arch: Ends) -> None:
    """Let the head multiply by the table's numbers."""
    table, head = model.get_submodule(arch.embed[0]), model.get_submodule(arch.head)
    if isinstance(table, Rows) and isinstance(head, Rows):
        head.common, head.rare, head.basis = table.common, table.rare, table.basis
        return
    assert isinstance(head, nn.Linear) and isinstance(table, nn.Embedding)
    head.weight, head.in_features = table.weight, table.weight.shape[1]


def _blank(module: nn.Module, shape: Shape) -> Factors:
    W = module.get_parameter("weight")
    rows, width = W.shape
    return (
        W.new_empty(shape.common, width),
        W.new_empty(rows - shape.common, shape.rank),
        W.new_empty(shape.rank, width),
    )


class _Scaled(nn.Embedding):
    """A table whose rows are multiplied by a number when they are looked up."""

    scale = 1.0

    def forward(self, ids: Tensor) -> Tensor:
        found = super().forward(ids)
        return found * torch.tensor(self.scale, dtype=found.dtype)


def make_plain(model: PreTrainedModel, arch: Ends) -> None:
    """Give a model that has no numbers a table and a head of one matrix each again."""
    table, head = model.get_submodule(arch.embed[0]), model.get_submodule(arch.head)
    assert isinstance(table, Table) and isinstance(head, Head)
    rows, width = len(table.common) + len(table.rare), table.in_features
    plain = (_Scaled if arch.scaled else nn.Embedding)(
        rows, width, dtype=table.common.dtype, device="meta"
    )
    if isinstance(plain, _Scaled):
        plain.scale = table.scale
    linear = nn.Linear(width, rows, bias=False, dtype=table.common.dtype, device="meta")
    if head.bias is not None:
        linear.bias = head.bias
    if is_tied(table, head):
        linear.weight = plain.weight
    model.set_submodule(arch.embed[0], plain)
    model.set_submodule(arch.head, linear)
    model._tied_weights_keys = model.all_tied_weights_keys = {}
