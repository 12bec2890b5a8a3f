"""The certificate of exactness: logits before and after, in float64, a derived tolerance, a control that must fail."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..core.change import Change
from ..core.dense import in_group
from ..core.group import Group
from ..core.operator import Operator
from ..core.pick import Pick
from .canonical import canonicalize
from .copies import double_copy
from .labels import label
from .layout import Layout
from .reparametrize import reparametrize


@dataclass(frozen=True)
class Certificate:
    """Relative logit error of the changed model in float64, and of a control to which half of a change was applied."""

    relative_error: float
    tolerance: float
    negative_control: float
    spaces: int
    restructured_error: float = 0.0  # of the reference itself, against the family's own code
    restructured_tolerance: float = 0.0

    @property
    def passed(self) -> bool:
        """Both errors are within their tolerances, and the control is far (1000 ×) outside of it."""
        return self.failure is None

    @property
    def failure(self) -> str | None:
        """Which check failed, and by how much; None where all hold."""
        if not self.restructured_error <= self.restructured_tolerance:
            return (
                f"the restructured model's logits differ from the family's own by {self.restructured_error:.1e}, where "
                f"rounding alone explains {self.restructured_tolerance:.1e}"
            )
        if not self.relative_error <= self.tolerance:
            return (
                f"the rotated model's logits differ by {self.relative_error:.1e}, where rounding alone explains "
                f"{self.tolerance:.1e}"
            )
        if not self.negative_control > 1000 * self.tolerance:
            return (
                f"the control, half of a change, moves the logits by {self.negative_control:.1e} only, so a fault "
                "might go unseen"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


CHANGED = 4
"""Sums that a signal meets in a stage whose spaces have new bases: the weight's product with the basis on its input side, with
that on its output side, that of a basis with its inverse, which is the identity up to rounding, and the weight's own."""


def tolerance(dtype: torch.dtype, depth: int, sums: int = 1) -> float:
    """The relative error that rounding alone can cause in a network of ``depth`` stages, each of so many ``sums`` in turn.

    A sum of n products errs by at most λ√n·u with probability 1 - 2·exp(-λ²/2) (Higham & Mary 2019, Theorem 2.4), u
    the unit roundoff. With λ = 8 and n = 2¹⁴, the longest sum in the models at hand, that is 2¹⁰·u; errors of
    successive stages add, and the embedding and the head count as one stage each.
    """
    return 2**10 * torch.finfo(dtype).eps / 2 * (depth + 2) * sums


def relative_error(reference: Tensor, other: Tensor) -> float:
    """‖other - reference‖ / ‖reference‖ over all logits, in float64."""
    reference, other = reference.double(), other.double()
    return ((other - reference).norm() / reference.norm()).item()


def exact_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 copy whose norms and softmax compute in float64 too; blocks restructured, no weight changed."""
    twin = double_copy(model)
    canonicalize(twin, fold=False)
    return twin


@torch.no_grad()
def certify(
    model: PreTrainedModel,
    bases: Mapping[str, Operator | Tensor],
    ids: Int[Tensor, "B T"],
    *,
    fold: bool,
    tie: str = "untie",
    seed: int = 0,
) -> Certificate:
    """Rotate a copy of a family's model by ``bases`` (space name → A) and compare its logits with the original's.

    Points of the stream that share one basis share one tensor; matrices with a space of their own are split in two. The
    control goes on from the rotated model: random elements of the same spaces' groups, applied to the writers only.
    """
    twin = double_copy(model)
    family = logits(twin, ids)
    matrices = canonicalize(twin, fold=False).matrices
    reference = logits(twin, ids)
    split = [n for n in bases if n in matrices]
    layout = canonicalize(twin, fold=fold, tie=tie, split=split)
    different = {id(A): A for A in bases.values()}
    made = {at: Change.rotation(A) for at, A in different.items()}
    reparametrize(twin, layout, {n: made[id(A)] for n, A in bases.items()})
    error = relative_error(reference, logits(twin, ids))
    layout = label(twin)
    reparametrize(twin, layout, half(layout, bases, seed))
    return Certificate(
        relative_error=error,
        tolerance=tolerance(torch.float64, layout.depth, CHANGED),
        negative_control=relative_error(reference, logits(twin, ids)),
        spaces=len(bases),
        restructured_error=relative_error(reference, family),
        restructured_tolerance=tolerance(
            torch.float32, layout.depth
        ),  # in which families' norms compute
    )


def canonical_layout(model: PreTrainedModel) -> Layout:
    """The layout of a model's folded form; of a model as it is, if it was folded or restructured before."""
    return canonicalize(copy.deepcopy(model).to(device="meta"), fold=True)  # type: ignore[call-arg]


def half(layout: Layout, names: Mapping[str, Any], seed: int) -> dict[str, Change]:
    """Random elements of the named spaces' groups, on the writers alone: no rotation of anything.

    Spaces of one shape and group take the same element, not the identity; it is wrong in each of them. A space that
    has no other element has its writers' columns moved or, of one dim, negated.
    """
    made: dict[Any, Change] = {}
    changes = {}
    for name in names:
        space = layout.spaces[name]
        shape = (space.dim, space.copies, space.group, space.rotary)
        if shape not in made:
            A, same = space.element(seed), Pick.first(space.copies, space.dim)
            if in_group(Group.IDENTITY, A):
                A = _another(same)
            made[shape] = Change(A, same)
        changes[name] = Change(made[shape].encode, made[shape].decode)
    return changes


def _another(same: Pick) -> Pick:
    """The identity's columns shifted by one; of one dim, the other sign, which no norm hides as it hides a size."""
    if same.dim > 1:
        return same.columns(torch.arange(same.dim).roll(1))
    return same.scaled(-same.entries)


def random_bases(layout: Layout, seed: int = 0) -> dict[str, Operator]:
    """A random group element for every space of a model, each point of the stream its own."""
    return {name: space.element(seed) for name, space in layout.spaces.items()}


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Int[Tensor, "B T"]) -> Tensor:
    return model(input_ids=ids.to(model.device), use_cache=False).logits
