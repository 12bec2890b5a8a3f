"""What varies in a study: keys of the recipe or groups of them, their values with labels, ranges to search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from ..core.errors import InputError, did_you_mean
from ..core.parts import Part
from ..recipe.complaints import validate
from ..recipe.recipe import Recipe
from ..recipe.yaml_text import Located, located, show

RANGE = ("low", "high", "step", "log")
Label = str | int | float | bool | None


@dataclass(frozen=True)
class Alternative:
    """One value of a factor: its label, and what it puts into the recipe."""

    label: Label
    values: tuple[tuple[tuple[str, ...], Located], ...]


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included."""

    low: float
    high: float
    step: float | None = None
    log: bool = False
    where: str = ""

    @property
    def whole(self) -> bool:
        return all(isinstance(n, int) for n in (self.low, self.high, self.step or 0))

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest number."""
        step = self.step
        return self.low, self.high if step is None else self.low + (
            self.high - self.low
        ) // step * step


@dataclass(frozen=True)
class Factor:
    """What varies: a key of the recipe, or a name for several that vary together."""

    name: str
    alternatives: tuple[Alternative, ...] = ()
    range: Range | None = None

    @property
    def samples(self) -> tuple[Alternative, ...]:
        """The alternatives, or those at the ends of the range."""
        return self.alternatives if self.range is None else tuple(map(self.at, self.range.ends))

    @property
    def paths(self) -> list[tuple[str, ...]]:
        """Where it sets something in the recipe."""
        return list(dict.fromkeys(path for a in self.samples for path, _ in a.values))

    def at(self, value: Any) -> Alternative:
        """The alternative that a searched number is."""
        assert self.range is not None
        return Alternative(
            value, ((tuple(self.name.split(".")), located(value, self.range.where)),)
        )


Number = (
    Annotated[int, Field(ge=-(2**53), le=2**53)]
    | Annotated[float, Field(ge=-(2.0**53), le=2.0**53, allow_inf_nan=False)]
)


class Bounds(Part):
    """Numbers that a search may propose, both ends included."""

    low: Number  # the least
    high: Number  # the greatest
    step: Number | None = None  # from one to the next; null for any
    log: bool = False  # whether they are drawn by their logarithms, true or false


def read_searched(name: str, node: Located) -> Factor:
    """A factor of a search: numbers between bounds, or alternatives."""
    value = node.plain()
    if not (isinstance(value, dict) and set(value) & set(RANGE)):
        return read_factor(name, node)
    try:
        bounds = validate(Bounds, node)
    except InputError as e:
        raise InputError(f"{e} It is of '{name}'; write {{low: 0.5, high: 1.0}}.") from None
    if (
        not bounds.low < bounds.high
        or (bounds.log and bounds.low <= 0)
        or (bounds.step is not None and bounds.step <= 0)
    ):
        raise InputError(
            f"{node.where}: {name}: no numbers lie there. `low` must be below `high`, `step` above 0, and with `log` all "
            "of them above 0."
        )
    if bounds.log and bounds.step is not None:
        raise InputError(f"{node.where}: {name}: `log` and `step` exclude each other; keep one.")
    return Factor(name, range=Range(**bounds.model_dump(), where=node.where))


def read_factor(name: str, node: Located, zipped: bool = False) -> Factor:
    """A key with a list of values, or with labelled ones; or a name of one's own with labelled groups of keys.

    Values may stand several times where they go together with others' (``zipped``).
    """
    is_key = name.split(".")[0] in Recipe.model_fields
    if not isinstance(node.value, list | dict) or not node.value:
        raise InputError(
            f"{node.where}: {name}: got {show(node.plain())}; write a list of values, or labels with values."
        )
    if not is_key:
        return Factor(
            name, tuple(_group(name, label, child) for label, child in _groups(name, node))
        )
    path = tuple(name.split("."))
    pairs = (
        node.value.items()
        if isinstance(node.value, dict)
        else ((short(c.plain()), c) for c in node.value)
    )
    found = tuple(Alternative(label, ((path, child),)) for label, child in pairs)
    labels = [a.label for a in found]
    if not zipped and (twice := [label for i, label in enumerate(labels) if label in labels[:i]]):
        raise InputError(f"{node.where}: {name}: the value {twice[0]} stands twice. Remove one.")
    return Factor(name, found)


def _groups(name: str, node: Located) -> list[tuple[str, Located]]:
    if isinstance(node.value, dict):
        return list(node.value.items())
    known = sorted(Recipe.model_fields)
    raise InputError(
        f"{node.where}: '{name}' is no key of a recipe{did_you_mean(name.split('.')[0], known)} A name of your own takes "
        "labels with groups of keys: {label: {key: value}}."
    )


def _group(name: str, label: str, node: Located) -> Alternative:
    if not isinstance(node.value, dict) or not node.value:
        raise InputError(
            f"{node.where}: {name}.{label}: got {show(node.plain())}; '{name}' is no key of a recipe, so each of its labels "
            "takes the keys that it sets: {label: {steps.0.rotate: pca}}."
        )
    for key, child in node.value.items():
        if (head := key.split(".")[0]) not in Recipe.model_fields:
            raise InputError(
                f"{child.where}: {name}.{label}: unknown key '{key}'{did_you_mean(head, Recipe.model_fields)}"
            )
    return Alternative(
        label, tuple((tuple(key.split(".")), child) for key, child in node.value.items())
    )


def short(value: Any) -> Label:
    """A value as a label: numbers and words as they are, a method with its options as name(option=value)."""
    if isinstance(value, dict):
        parts = (
            f"{k}({short(v)})" if isinstance(v, dict) else f"{k}={short(v)}"
            for k, v in value.items()
        )
        return ", ".join(parts)
    return " + ".join(str(short(v)) for v in value) if isinstance(value, list) else value
