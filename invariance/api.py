"""The names that `import invariance` gives, and the model type that it makes known to transformers."""

from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis, Change
from invariance.core.errors import CertificateError, InputError, InvarianceError
from invariance.core.group import Group
from invariance.core.operator import Operator
from invariance.core.pick import Pick
from invariance.core.space import Space
from invariance.io import checkpoint  # registers the model type with transformers
from invariance.method.interfaces import Rotator, Selector, Slicer
from invariance.recipe.recipe import Recipe, load_recipe
from invariance.run.run import compress, load

__all__ = [
    "Basis",
    "CertificateError",
    "Change",
    "Group",
    "InputError",
    "InvarianceError",
    "Operator",
    "Pick",
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
