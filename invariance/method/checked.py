"""What methods return, checked in one place: shapes, numbers, groups. A fault is told with the method's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from ..core.change import Basis, Change
from ..core.errors import InputError, InvarianceError
from ..core.group import Group
from ..core.operator import RTOL, Operator
from ..core.space import Space
from .interfaces import Basing, Joint, Method, Rotator, Selector, Slicer

if TYPE_CHECKING:
    from ..calibrate.moments import Moments
    from .budget import Bill
    from .joint import Scene

SCALES = {
    Group.IDENTITY: "1",
    Group.PERMUTATION: "1",
    Group.SIGNED_PERMUTATION: "1 or −1",
    Group.POSITIVE_MONOMIAL: "above 0",
    Group.MONOMIAL: "other than 0",
}


def fitted(rotator: Rotator, space: Space, moments: Moments) -> Basis:
    """What a rotator gives a space, if it can be. Raises InvarianceError."""
    return based(rotator, space, rotator.fit(space, moments))


def jointly(joint: Joint, scene: Scene) -> dict[str, Basis | Change]:
    """What a joint method gives each space that it was asked for, if it can be. Raises InvarianceError."""
    given = joint.fit(scene)
    if not isinstance(given, Mapping):
        _fault(joint, None, f"gave {type(given).__name__}, and not a mapping of spaces")
    for name in given:
        if name not in scene.spaces:
            _fault(joint, None, f"gave space '{name}' something, for which it was not asked")
    found: dict[str, Basis | Change] = {}
    for name, space in scene.spaces.items():
        if name not in given:
            _fault(joint, space, "gave it nothing")
        one = given[name]
        if not isinstance(one, Change):
            found[name] = based(joint, space, one)
        elif scene.widths is None:
            _fault(joint, space, "gave a Change where no width is known yet; set `needs_widths`")
        else:
            found[name] = changed(joint, space, one, scene.widths[name])
    return found


def based(method: Basing, space: Space, basis: Basis) -> Basis:
    """A basis that a method gave a space, if it can be. Raises InvarianceError."""
    if not isinstance(basis, Basis):
        _fault(method, space, f"gave {type(basis).__name__}, and not a Basis")
    d, c = space.dim, space.copies
    if basis.A.shape != (c, d, d):
        _fault(method, space, f"gave a basis of shape {basis.A.shape}; it must be {(c, d, d)}")
    energy = basis.energy
    if not isinstance(energy, Tensor) or tuple(energy.shape) != (c, d):
        there = tuple(energy.shape) if isinstance(energy, Tensor) else type(energy).__name__
        _fault(
            method,
            space,
            f"gave energies of shape {there}; there must be {(c, d)}, one a direction",
        )
    if not _finite(*basis.A.tensors):
        _fault(method, space, "gave a basis with NaN or infinite numbers")
    if not _finite(energy):
        _fault(method, space, "gave energies that are NaN or infinite")
    least = float(energy.min())
    if least < -1e-6 * float(energy.abs().max()):  # below what rounding makes of zero
        _fault(
            method,
            space,
            f"gave an energy of {least:.3g}; what a direction loses cannot be below 0",
        )
    if not space.contains(basis.A):
        _fault(
            method,
            space,
            f"gave a basis outside the group '{space.group.value}', so it would not be exact",
        )
    if not basis.A.within(method.produces, space.rotary):
        _fault(
            method, space, f"says that it gives '{method.produces.value}', and gave another basis"
        )
    return basis


def cut(slicer: Slicer, space: Space, basis: Basis, k: int, moments: Moments) -> Change:
    """What a slicer makes of a space, if it can be. Raises InvarianceError."""
    return changed(slicer, space, slicer.cut(space, basis, k, moments), k)


def changed(method: Method, space: Space, change: Change, k: int) -> Change:
    """A change of a space to width k that a method gave, if it can be. Raises InvarianceError."""
    if not isinstance(change, Change):
        _fault(method, space, f"gave {type(change).__name__}, and not a Change")
    (c, d), grain = (space.copies, space.dim), space.grain
    if change.encode.shape != (c, d, k):
        _fault(method, space, f"gave an E of shape {change.encode.shape}; it must be {(c, d, k)}")
    shapes = ((c, d, k), (c, d * grain, k * grain))
    if change.decode.shape not in shapes:
        told = " or ".join(map(str, dict.fromkeys(shapes)))
        _fault(method, space, f"gave a D of shape {change.decode.shape}; it must be {told}")
    for name, tensors in (("E", change.encode.tensors), ("D", change.decode.tensors)):
        if not _finite(*tensors):
            _fault(method, space, f"gave a {name} with NaN or infinite numbers")
    if change.offset is not None and not (
        _finite(change.offset) and tuple(change.offset.shape) == (c, d * grain)
    ):
        _fault(
            method, space, f"gave an offset that is not finite, or not of shape {(c, d * grain)}"
        )
    if why := _outside(space, change.encode):
        _fault(method, space, f"gave an E outside the group '{space.group.value}': {why}")
    return change


def allocated(selector: Selector, widths: Mapping[Space, int], bill: Bill) -> None:
    """Raises InputError for widths that the recipe's constraints, or the selector's own, do not allow."""
    for space, allowed in bill.widths.items():
        k = widths.get(space)
        if k is None:
            raise InputError(f"selector '{selector.name}' gave space '{space.name}' no width.")
        if k not in allowed:
            near = min(allowed, key=lambda width: abs(width - k))
            raise InputError(
                f"selector '{selector.name}' gave space '{space.name}' the width {k}, which `widths` (multiple_of, min, max, "
                f"protect) or `stock` does not allow; {near} is the nearest that they do. A selector must keep to `cost.widths`."
            )


def _fault(method: Method, space: Space | None, what: str) -> NoReturn:
    kinds = {"rotate": "rotator", "joint": "joint method", "slice": "slicer"}
    where = "" if space is None else f", space '{space.name}'"
    raise InvarianceError(
        f"{kinds.get(method.kind, method.kind)} '{method.name}'{where}: {what}. This is a fault of the method, not of the recipe."
    )


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())


def _outside(space: Space, E: Operator) -> str | None:
    """Why no element of a space's group begins with these columns; None where one does."""
    group = space.group
    if group in SCALES:
        return _no_choice(group, E)
    if group is Group.ORTHOGONAL and E.picks is None:
        X = E.matrix()
        off = (X.mT @ X - torch.eye(X.shape[-1], dtype=X.dtype)).abs().max()
        return f"its columns are no orthonormal ones, by {off:.1e}" if off > 1e3 * RTOL else None
    if group is Group.ROTARY and space.rotary:
        return _no_pairs(E.matrix(), space.rotary, space.spared)
    return None


def _no_choice(group: Group, E: Operator) -> str | None:
    """Why columns are no choice of coordinates with scales that a group allows."""
    if E.picks is None:
        return "a column mixes several coordinates"
    if any(len(set(row)) != len(row) for row in E.picks.tolist()):
        return "it takes a coordinate twice"
    scale = E.contract(torch.ones(1, E.shape[0] * E.shape[1], dtype=torch.float64), runs=E.shape[0])
    fine = {
        "1": scale == 1,
        "1 or −1": scale.abs() == 1,
        "above 0": scale > 0,
        "other than 0": scale != 0,
    }[SCALES[group]]
    return None if bool(fine.all()) else f"its scales must be {SCALES[group]}"


def _no_pairs(X: Tensor, rotary: int, spared: int) -> str | None:
    """Why columns are no frequency pairs with a complex scale each, in front of what positions spare."""
    half, p = rotary // 2, (X.shape[-1] - spared) // 2
    turned = X[:, :rotary, : 2 * p]
    a, b = turned[:, :half], turned[:, half:]
    limit = 1e3 * RTOL * X.abs().max()
    if (a[..., :p] - b[..., p:]).abs().max() > limit or (
        a[..., p:] + b[..., :p]
    ).abs().max() > limit:
        return "a pair is not turned as one complex number"
    if int((a.abs() + b.abs() > limit)[..., :p].sum(1).max()) > 1:
        return "it mixes several frequency pairs"
    apart = torch.cat([X[:, :rotary, 2 * p :].flatten(), X[:, rotary:, : 2 * p].flatten()])
    if apart.numel() and apart.abs().max() > limit:
        return "it mixes what positions turn with what they spare"
    return None
