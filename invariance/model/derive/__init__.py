"""Spaces, groups and folds of any model, derived from one traced forward pass.

``derive(model, examples)`` says what may be changed, ``certify(model, derived, probes)`` whether it holds.
"""

from .analysis import Derived, derive
from .block import Block, Kind
from .certify import Certificate, Probe, certify
from .fold import fold
from .turn import Plan, turn

__all__ = [
    "Block",
    "Certificate",
    "Derived",
    "Kind",
    "Plan",
    "Probe",
    "certify",
    "derive",
    "fold",
    "turn",
]
