"""The names that `import invariance` gives, and the model type that it makes known to transformers."""

from . import checkpoint  # registers the model type with transformers
from .errors import CertificateError, InputError, InvarianceError
from .interfaces import Rotator, Selector, Slicer, Statistic
from .recipe import Recipe, load_recipe
from .run import compress, load
from .space import Basis, Change, Group, Space

__all__ = [
    "Basis",
    "CertificateError",
    "Change",
    "Group",
    "InputError",
    "InvarianceError",
    "Recipe",
    "Rotator",
    "Selector",
    "Slicer",
    "Space",
    "Statistic",
    "checkpoint",
    "compress",
    "load",
    "load_recipe",
]
