"""The names that `import invariance` gives, and the model type that it makes known to transformers."""

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis, Change
from invariance.core.errors import CertificateError, InputError, InvarianceError
from invariance.core.group import Group
from invariance.core.operator import Operator
from invariance.core.pick import Pick
from invariance.core.space import Space
from invariance.io import checkpoint, narrowed  # register their model types with transformers
from invariance.io.models import load_tokenizer
from invariance.method.interfaces import Joint, Rotator, Selector, Slicer
from invariance.method.joint import Scene
from invariance.model.layout import Layout
from invariance.model.verify import Certificate, tolerance
from invariance.recipe.recipe import Recipe, load_recipe
from invariance.run.compress import compress, load
from invariance.run.research import (
    apply,
    bases,
    calibrate,
    certify,
    evaluate,
    inspect_model,
    perplexity,
    rotate,
)
from invariance.run.result import Result, compression

__all__ = [
    "Basis",
    "Certificate",
    "CertificateError",
    "Change",
    "Group",
    "InputError",
    "InvarianceError",
    "Joint",
    "Layout",
    "Moments",
    "Operator",
    "Pick",
    "Recipe",
    "Result",
    "Rotator",
    "Scene",
    "Selector",
    "Slicer",
    "Space",
    "Statistic",
    "apply",
    "bases",
    "calibrate",
    "certify",
    "checkpoint",
    "compress",
    "compression",
    "evaluate",
    "inspect_model",
    "load",
    "load_recipe",
    "load_tokenizer",
    "narrowed",
    "perplexity",
    "rotate",
    "tolerance",
]
