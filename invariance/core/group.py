"""Groups: which changes of basis of a space leave the network's function unchanged, and how they are included."""

from __future__ import annotations

from enum import Enum


class Group(Enum):
    """The changes of basis of a space that leave the network's function unchanged.

    ``a <= b`` reads "every element of a is an element of b". Elements act on column vectors as Aᵀx.
    """

    IDENTITY = "identity"
    PERMUTATION = "permutation"
    SIGNED_PERMUTATION = "signed permutation"
    POSITIVE_MONOMIAL = "permutation and positive scale"  # under ReLU
    MONOMIAL = "permutation and scale"  # the linear branch of a gated MLP
    ORTHOGONAL = "orthogonal"
    ROTARY = (  # under rotary positions; invertible on the dims they spare
        "frequency pairs permuted, their frequencies moving along, one complex scale each"
    )
    INVERTIBLE = "invertible"

    def __le__(self, other: Group) -> bool:
        return other is self or any(wider <= other for wider in _WIDER[self])

    @property
    def why(self) -> str:
        """The reason that the group is no wider, for error messages."""
        return _WHY[self]


_WIDER: dict[Group, tuple[Group, ...]] = {
    Group.IDENTITY: (Group.PERMUTATION, Group.ROTARY),
    Group.PERMUTATION: (Group.SIGNED_PERMUTATION, Group.POSITIVE_MONOMIAL),
    Group.SIGNED_PERMUTATION: (Group.ORTHOGONAL, Group.MONOMIAL),
    Group.POSITIVE_MONOMIAL: (Group.MONOMIAL,),
    Group.MONOMIAL: (Group.INVERTIBLE,),
    Group.ORTHOGONAL: (Group.INVERTIBLE,),
    Group.ROTARY: (Group.INVERTIBLE,),
    Group.INVERTIBLE: (),
}
_WHY = {
    Group.IDENTITY: "nothing else commutes with what reads the space",
    Group.PERMUTATION: "an elementwise activation sits between its writers and its readers",
    Group.SIGNED_PERMUTATION: "norms with gains stand between what writes the space and the space",
    Group.POSITIVE_MONOMIAL: "ReLU commutes with permutations and positive scales alone",
    Group.MONOMIAL: "an activation sits on the gate and only the linear branch may be scaled",
    Group.ORTHOGONAL: "the norm that reads the space divides by the length of its input",
    Group.ROTARY: "rotary positions turn each frequency pair by its own angle",
    Group.INVERTIBLE: "only a singular matrix loses information",
}
