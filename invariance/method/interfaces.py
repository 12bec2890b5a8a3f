"""The interfaces that a compression method implements, and the registry that finds it by name."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from jaxtyping import Float64
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ..calibrate.statistic import Statistic
from ..core.change import Basis, Change
from ..core.errors import InputError, did_you_mean
from ..core.group import Group
from ..core.space import Space

if TYPE_CHECKING:
    from ..calibrate.moments import Moments
    from .budget import Bill
    from .joint import Scene

ENTRY_POINTS = "invariance.methods"
KINDS = frozenset(
    {"residual", "mlp", "vo", "qk", "edge"}
)  # where a method makes sense that does not say


class Method:
    """What all methods share: a name in the registry, options that are dataclass fields, a docstring as manual.

    What a method says of itself by a property here, it states as a class attribute, or as a property where an option
    decides.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    alternatives: ClassVar[
        tuple[frozenset[str], ...]
    ] = ()  # options of which a recipe gives at most one

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name
            _register(cls)

    @property
    def needs(self) -> frozenset[Statistic]:
        """What is measured for it."""
        return frozenset()

    def spec(self) -> str | dict[str, dict[str, Any]]:
        """How a recipe writes this method: its name, or ``{name: {option: value}}``."""
        options = {
            f.name: value
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, f.name)) != f.default
        }
        return {self.name: options} if options else self.name


class WidthLimit(Protocol):
    """A function of a width that says what speaks against it, or None."""

    def __call__(self, width: int, /) -> str | None: ...


NATS = "nats"


class Basing(Method, ABC):
    """What gives spaces their exact bases: one space at a time from moments (Rotator), or many from the model (Joint)."""

    produces: ClassVar[Group]  # must be included in the space's group, or the plan is refused
    kinds: ClassVar[frozenset[str]] = KINDS  # where it makes sense
    width_limit: ClassVar[WidthLimit | None] = (
        None  # why a width cannot be served, or None where it can
    )
    nested: ClassVar[bool] = (
        False  # whether an energy supposes that all behind it are gone; then it need not fall
    )
    refits: ClassVar[bool] = False  # whether energies suppose that the readers are refit

    @property
    def unit(self) -> str:
        """What its energies are in: ``NATS`` a token, or whatever else, by default what no other method's are in."""
        return f"units of '{self.name}'"

    @property
    def nats(self) -> bool:
        """Whether its energies are losses in nats per token."""
        return self.unit == NATS

    @property
    def shares_basis(self) -> bool:
        """Whether all query/key spaces of a step get one basis."""
        return False


class Rotator(Basing, ABC):
    """Which exact basis a space gets."""

    kind = "rotate"

    @abstractmethod
    def fit(self, space: Space, moments: Moments) -> Basis:
        """The basis of one space, A of shape (copies, dim, dim) in ``produces``, directions by falling energy.

        Where ``shares_basis``, the copies are those of all layers, and all of them must get the same basis.
        """


class Joint(Basing, ABC):
    """What many spaces get at once, by one who sees the model: a recipe names it in the place of a rotator."""

    kind = "joint"
    needs_widths: ClassVar[bool] = False  # whether widths must be known before it is asked

    @abstractmethod
    def fit(self, scene: Scene) -> Mapping[str, Basis | Change]:
        """What each space of ``scene.spaces`` gets, by name.

        A Basis, A of shape (copies, dim, dim) in ``produces``, float64, which the step's slicer cuts; or, where
        ``needs_widths``, the Change itself, to the width that ``scene.widths`` says.
        """


class Selector(Method, ABC):
    """How wide every space stays, under one budget."""

    kind = "select"
    depth: ClassVar[bool] = (
        False  # whether it lets branches go and leaves all else whole, for a later step to cut
    )
    multiple_of: int = (
        1  # of which widths are multiples, beside what the step's `widths` say; an option of some
    )

    @property
    def needs_spectra(self) -> bool:
        """Whether it reads the energies of every space."""
        return False

    @property
    def compares(self) -> bool:
        """Whether it sets the energies of different spaces against each other as they are, so that they need one currency."""
        return False

    @property
    def needs_budget(self) -> bool:
        """Whether it spends the recipe's budget."""
        return False

    @property
    def measures(self) -> bool:
        """Whether it asks ``cost.loss`` for the held-out loss of widths."""
        return False

    @abstractmethod
    def allocate(
        self,
        spectra: Mapping[Space, Float64[Tensor, "c d"] | None],
        cost: Bill,
        budget: float | None,
    ) -> Mapping[Space, int]:
        """The width kept of every space in ``spectra``.

        ``spectra`` holds each space's energies by falling order (None unless ``needs_spectra``). ``cost(widths)``
        counts what a choice of widths spends (spaces left out keep what they have), ``cost.widths`` lists the widths
        that are allowed, ``budget`` is the most that may be spent, or None when the recipe gives none; that the
        narrowest widths meet it has been checked. Plans ask once with flat spectra, so that what cannot be is refused
        before calibration. A selector that knows what its choice loses returns it as ``Predicted``.
        """


class Slicer(Method, ABC):
    """How a space is cut to its width, and who compensates for what is gone."""

    kind = "slice"
    kinds: ClassVar[frozenset[str]] = KINDS  # where it makes sense
    offsets: ClassVar[bool] = (
        False  # whether its changes have an offset, so that readers get biases
    )
    mixes: ClassVar[bool] = (
        False  # whether what is cut is read from other directions: not across rotary pairs
    )
    prefix: ClassVar[bool] = False  # whether a narrower cut is a part of every wider one, unchanged

    @abstractmethod
    def cut(self, space: Space, basis: Basis, k: int, moments: Moments) -> Change:
        """The change of one space to width k; exact when k = dim."""


_REGISTRY: dict[str, dict[str, type[Method]]] = {
    "rotate": {},
    "joint": {},
    "select": {},
    "slice": {},
    "round": {},
}
BASING = ("rotate", "joint")
_loaded = False
_PLUGINS: set[str] = set()  # that were loaded


def _register(cls: type[Method]) -> None:
    kinds = (
        BASING if cls.kind in BASING else (cls.kind,)
    )  # of which a recipe names one in one place
    known = next((k[cls.name] for kind in kinds if cls.name in (k := _REGISTRY[kind])), None)
    if known is not None and (known.__module__, known.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise InputError(
            f"{cls.__module__}: the name '{cls.name}' is taken by {known.__module__}.{known.__qualname__}. "
            "Give the new method a name of its own."
        )
    _REGISTRY[cls.kind][cls.name] = cls


def registry(kind: str) -> Mapping[str, type[Any]]:
    """All methods of a kind (``rotate``, ``joint``, ``select``, ``slice``, ``round``) by name; loads entry points on first use."""
    global _loaded
    if not _loaded:
        _loaded = True
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
            entry.load()
    return _REGISTRY[kind]


def find(kind: str, name: str) -> type[Any]:
    """The method class of that kind and name. Raises InputError, with the closest known name."""
    known = registry(kind)
    if name not in known:
        raise InputError(f"no {kind} method is called '{name}'{did_you_mean(name, known)}")
    return known[name]


def begin(plugins: Iterable[str]) -> None:
    """Make a process that was started to work ready: the package has its public names, methods are registered."""
    importlib.import_module("invariance").publish()
    for module in plugins:
        load_plugin(module)


def load_plugin(module: str) -> None:
    """Import a module, named as Python imports it or as a path to a .py file, so that its methods register."""
    before = _registered()
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(
                f"invariance_plugin_{Path(module).stem}", module
            )
            assert spec is not None and spec.loader is not None
            made = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = made  # dataclasses look their module up there
            spec.loader.exec_module(made)
        else:
            made = importlib.import_module(module)
    except InputError:
        raise
    except (Exception, SystemExit) as e:  # whatever the module raises while it is imported
        raise InputError(
            f"--plugin {module}: cannot be imported ({e}). Give a module on the path, or a .py file."
        ) from e
    ours = [
        c
        for known in _REGISTRY.values()
        for c in known.values()
        if c.__module__.startswith(made.__name__)
    ]
    if before == _registered() and not ours and module not in _PLUGINS:
        raise InputError(
            f"--plugin {module}: registers no method and no model. Subclass Rotator, Joint, Selector, Slicer or Rounding "
            "with a `name=` there, or register a model with `AutoModelForCausalLM.register`."
        )
    _PLUGINS.add(module)


def _registered() -> dict[str, dict[Any, Any]]:
    """What plugins may add to: methods of each kind, and model classes that transformers has not."""
    models: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    own = dict(models._extra_content)
    return {**{kind: dict(registry(kind)) for kind in _REGISTRY}, "models": own}
