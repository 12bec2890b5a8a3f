"""The study: a recipe and what varies in it, read from YAML so that every mistake is told with its line."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..core.errors import InputError, did_you_mean
from ..core.parts import Part, Words
from ..recipe.complaints import validate
from ..recipe.overrides import assign, override
from ..recipe.recipe import Recipe, recipe_of
from ..recipe.yaml_text import Located, parse_mapping, read_text, show, written
from .factors import Alternative, Factor, Label, read_factor, read_searched
from .table import NUMBERS, WORDS, is_number, measured

MAX_RUNS = 1000
DRAWN = ("perplexity",)


class Search(Part):
    """Trials that are chosen by what those before them gave."""

    over: dict[str, Any]  # keys with lists of values or ranges, as in {seed: {low: 0, high: 9}}
    trials: Annotated[int, Field(ge=1, le=MAX_RUNS)] = 32  # how many runs
    sampler: Literal["tpe", "nsga2"] = (
        "tpe"  # tpe (a model of what was good) or nsga2 (evolution of a front)
    )
    minimize: Words = ("perplexity", "parameters")  # columns of the results
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # the seed of the sampler
    prune: bool = False  # whether runs stop that are worse than the median early, true or false


class StudyFile(Part):
    """What a study's file holds."""

    base: Any  # a recipe, or the path of one beside the study's file
    set: dict[str, Any] = Field(
        default_factory=dict
    )  # keys of the recipe that all runs have otherwise, as in {order: oneshot}
    grid: dict[str, Any] = Field(
        default_factory=dict
    )  # keys of which all combinations are run, as in {seed: [0, 1]}
    zip: dict[str, Any] = Field(
        default_factory=dict
    )  # keys that vary together, one value of each a run
    search: Search | None = (
        None  # in place of all being run, as in {over: {seed: [0, 1]}, trials: 2}
    )
    x: str | None = None  # the key or column along the curves' x axis
    y: Words = DRAWN  # columns of the results that are drawn, a figure each
    speed: bool = False  # whether tokens per second are measured too, true or false


@dataclass(frozen=True, eq=False)
class Variant:
    """One run of a study: what it has of each factor, and its recipe."""

    varied: Mapping[str, Label]
    recipe: Recipe


@dataclass(frozen=True)
class Study:
    """A base recipe and what varies, checked."""

    name: str
    base: Located
    grid: tuple[Factor, ...]
    zipped: tuple[Factor, ...]
    searched: tuple[Factor, ...]
    options: StudyFile
    where: str

    @property
    def varying(self) -> tuple[Factor, ...]:
        return (*self.grid, *self.zipped, *self.searched)

    @property
    def factors(self) -> list[str]:
        return [f.name for f in self.varying]

    @property
    def titles(self) -> dict[str, str]:
        """Factors by as much of their ends as tells them apart, for tables."""
        ends = {
            f: [".".join(f.split(".")[-n:]) for n in range(1, f.count(".") + 2)]
            for f in self.factors
        }
        return {
            f: next((e for e in found if sum(e in other for other in ends.values()) == 1), f)
            for f, found in ends.items()
        }

    def variant(self, chosen: Mapping[str, Alternative]) -> Variant:
        """The run that has these alternatives of the factors. Raises InputError at the line of what cannot be."""
        tree = copy.deepcopy(self.base)
        for alternative in chosen.values():
            for path, value in alternative.values:
                assign(tree, path, copy.deepcopy(value), value.where)
        return Variant({name: a.label for name, a in chosen.items()}, recipe_of(tree))

    def to_yaml(self) -> str:
        """The study with its base in full and changed as was asked, as YAML that ``load_study`` reads anywhere."""
        asked = self.options.model_dump(exclude={"base", "set"}, exclude_defaults=True, mode="json")
        return written({"base": self.base.plain(), **asked})

    def choices(self) -> Iterator[dict[str, Alternative]]:
        """All combinations of the grid, each with every item of the zipped lists."""
        rows = list(zip(*(f.alternatives for f in self.zipped), strict=True)) or [()]
        names = [f.name for f in (*self.grid, *self.zipped)]
        for chosen in itertools.product(*(f.alternatives for f in self.grid)):
            for row in rows:
                yield dict(zip(names, (*chosen, *row), strict=True))

    def variants(self) -> list[Variant]:
        """All runs of a study that is no search, in the order of its file."""
        return [self.variant(chosen) for chosen in self.choices()]


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study from a file; ``key=value`` overrides change its base recipe. Raises InputError."""
    path = Path(path)
    root = parse_mapping(read_text(path, "study"), str(path), "study", "`base` and `grid`")
    options = validate(StudyFile, root)
    base = _base(root, path)
    given = {f"{value.where}: set: {key}": key for key, value in _entries(root.child("set"))}
    for key, value in _entries(root.child("set")):
        assign(base, key.split("."), value, value.where)
    for assignment in overrides:
        override(base, assignment)
        key = assignment.partition("=")[0]
        given[f"--set {key}"] = key
    search = root.child("search")
    grid, zipped = (
        tuple(read_factor(name, node, key == "zip") for name, node in _entries(root.child(key)))
        for key in ("grid", "zip")
    )
    searched = tuple(
        read_searched(name, node)
        for name, node in _entries(search.child("over") if search else None)
    )
    study = Study(path.stem, base, grid, zipped, searched, options, str(path))
    _check(study, root)
    _check_given(study, given)
    return study


def _check(study: Study, root: Located) -> None:
    search = study.options.search
    if not study.factors:
        raise InputError(
            f"{_line(root, 'search', 'zip', 'grid')}: nothing varies. Give keys with values under `grid`, `zip` or "
            "`search.over`; one recipe alone is what `invariance run` is for."
        )
    _check_factors(study)
    _check_columns(study, root)
    if search is not None and (study.grid or study.zipped):
        raise InputError(
            f"{study.where}: a study is a grid or a search. Move `grid` and `zip` into `search.over`, or remove one."
        )
    lengths = {f.name: len(f.alternatives) for f in study.zipped}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"'{name}' has {n}" for name, n in lengths.items())
        raise InputError(
            f"{_line(root, 'zip')}: lists of different lengths: {told}. Zipped keys need one value each a run; use `grid` "
            "for all combinations."
        )
    count = len(list(itertools.islice(study.choices(), MAX_RUNS + 1)))
    if count > MAX_RUNS:
        raise InputError(
            f"{study.where}: more than {MAX_RUNS} runs. Vary less at a time, or use `search`."
        )
    if search is not None and search.prune and search.minimize != ("perplexity",):
        raise InputError(
            f"{_line(root, 'search')}: only a search that minimizes perplexity alone can be pruned. Write "
            "`minimize: [perplexity]`, or remove `prune`."
        )


def _line(root: Located, *keys: str) -> str:
    """Where the first of these keys stands that is there."""
    return next((node.where for node in map(root.child, keys) if node is not None), root.where)


def _check_factors(study: Study) -> None:
    """Raises InputError where one factor would undo what another one sets, or hide a column of the results."""
    earlier: dict[tuple[str, ...], str] = {}
    for factor in study.varying:
        name = factor.name
        if name in earlier.values():
            raise InputError(
                f"{study.where}: '{name}' varies twice. Let each key vary in one place."
            )
        if (
            name.split(".")[0] in (*WORDS, *NUMBERS)
            and name.split(".")[0] not in Recipe.model_fields
        ):
            raise InputError(
                f"{study.where}: '{name}' varies, and the results have a column of that name. Call it otherwise."
            )
        for path in factor.paths:
            if lost := next((p for p in earlier if p[: len(path)] == path), None):
                raise InputError(
                    f"{study.where}: '{name}' sets {'.'.join(path)} and so undoes what '{earlier[lost]}' sets at "
                    f"{'.'.join(lost)}. Let each key vary in one place, or put '{name}' first."
                )
        earlier |= dict.fromkeys(factor.paths, name)


def _check_given(study: Study, given: Mapping[str, str]) -> None:
    """Raises InputError where a factor varies what is set for all runs, or what is set is a part of what varies."""
    for factor, (where, key) in itertools.product(study.varying, given.items()):
        for path in factor.paths:
            if all(a == b for a, b in zip(path, key.split("."), strict=False)):
                raise InputError(
                    f"{where}: '{factor.name}' varies {'.'.join(path)}, so runs would not have what is set here. Leave it "
                    f"out, or remove '{factor.name}' from what varies."
                )


def check_measured(study: Study, recipes: Sequence[Recipe]) -> None:
    """Raises InputError for columns to draw along or to minimize that the results of none of these recipes will have."""
    search, x = study.options.search, study.options.x
    asked = [("x", x)] if x is not None and x not in study.factors else []
    asked += [("y", name) for name in study.options.y if study.options.y != DRAWN]
    asked += [("search.minimize", name) for name in (search.minimize if search else ())]
    known = measured(recipes)
    for key, name in asked:
        if name not in known and not name.startswith("seconds."):
            none = ", as none evaluates perplexity (add `evaluate` to the base)"
            why = "" if "perplexity" in known else none
            raise InputError(
                f"{study.where}: {key}: no run will have numbers called '{name}'{why}{did_you_mean(name, known)}"
            )


def _check_columns(study: Study, root: Located) -> None:
    """Raises InputError for columns to draw along or to minimize that the results do not have, or not as numbers."""
    numbers = [f.name for f in study.varying if all(is_number(a.label) for a in f.alternatives)]
    search = study.options.search
    asked = [] if study.options.x is None else [(study.options.x, "x", numbers)]
    asked += [(name, "y", []) for name in study.options.y]
    asked += [(name, "search.minimize", []) for name in (search.minimize if search else ())]
    for name, key, also in asked:
        where = f"{_line(root, key.split('.')[0])}: {key}"
        if name not in also and name.split(".")[0] not in NUMBERS:
            known = [*also, *NUMBERS]
            raise InputError(
                f"{where}: no numbers of the results are called '{name}'{did_you_mean(name, known)}"
            )
        if name == "seconds_per_token" and not study.options.speed:
            raise InputError(
                f"{where}: '{name}' is not measured. Add `speed: true`, or name another column."
            )


def _base(root: Located, path: Path) -> Located:
    base = root.child("base")
    assert base is not None
    if isinstance(base.value, dict):
        return base
    if not isinstance(base.value, str):
        raise InputError(
            f"{base.where}: base: got {show(base.plain())}; write a recipe, or the path of one."
        )
    file = path.parent / base.value
    try:
        return parse_mapping(read_text(file), str(file), "recipe", "`model` and `steps`")
    except InputError as e:
        raise InputError(f"{base.where}: base: {e}") from None


def _entries(node: Located | None) -> list[tuple[str, Located]]:
    return list(node.value.items()) if node is not None and isinstance(node.value, dict) else []
