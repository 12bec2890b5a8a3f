"""The recipe: what may be asked for, read from YAML so that every mistake is told with its line."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import itertools
import json
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PrivateAttr,
    PydanticUserError,
    Tag,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from .errors import InputError, did_you_mean
from .interfaces import Method, Rotator, Selector, Slicer, Statistic, find, registry

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 2**20, 10_000, 32  # of a recipe's text, its aliases expanded
METHODS = ("rotate", "select", "slice")
SPACES = {"residual": "x", "mlp": "mlp", "vo": "vo", "qk": "qk"}  # a kind, and how names of its spaces begin
TEXT_TAGS = {
    f"tag:yaml.org,2002:{t}" for t in ("str", "timestamp", "merge", "value")
}  # dates, << and = are words
SAFE_TAGS = TEXT_TAGS | {f"tag:yaml.org,2002:{t}" for t in ("null", "bool", "int", "float", "seq", "map")}


class _Problem(ValueError):
    """What is wrong, at a path below the value that is being validated."""

    def __init__(self, message: str, *path: str | int):
        super().__init__(message)
        self.path = path


# --- The schema. The comment that ends a field's line is its description, in messages and in the JSON Schema.


def _method(kind: str, value: Any) -> Any:
    """A method's instance from its name or ``{name: {option: value}}``."""
    if isinstance(value, Method) or (value is None and kind != "rotate"):
        return value
    given = {value: None} if isinstance(value, str) else value
    if not isinstance(given, dict) or not given:
        raise _Problem(f"got {_show(value)}; write a method as NAME or {{NAME: {{OPTION: VALUE}}}}")
    (name, options), *others = given.items()
    if others:
        raise _Problem(f"'{name}' stands here already; keep one method", others[0][0])
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise _Problem(f"got {_show(options)}; write options as {{{name}: {{OPTION: VALUE}}}}", name)
    try:
        cls = find(kind, name)
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        for option in options:
            if option not in known:
                raise _Problem(
                    f"'{name}' has no option '{option}'{did_you_mean(option, known)}", name, option
                )
        for group in cls.alternatives:
            if len(both := [option for option in options if option in group]) > 1:
                raise _Problem(f"'{both[0]}' and '{both[1]}' exclude each other; keep one", name, both[1])
        return TypeAdapter(cls).validate_json(json.dumps(options, allow_nan=False), strict=True)
    except ValidationError as e:
        error = e.errors()[0]
        told = (option for option in options if re.search(rf"\b{option}\b", error["msg"]))
        raise _Problem(_should(error), name, *(error["loc"] or itertools.islice(told, 1))) from None
    except _Problem:
        raise
    except (InputError, TypeError, ValueError, NameError, PydanticUserError) as e:  # also a faulty plugin's
        raise _Problem(_first_line(e), name) from None


def _spaces(value: Any) -> tuple[str, ...]:
    """Kinds, names or glob patterns, each of them one that some model could have."""
    patterns = tuple(value) if isinstance(value, list | tuple) else (value,)
    for i, pattern in enumerate(patterns):
        at = (i,) if isinstance(value, list) else ()
        if not isinstance(pattern, str):
            raise _Problem(f"got {_show(pattern)}; write a space's kind, a name or a pattern", *at)
        head, _, rest = pattern.partition(".")
        if pattern not in SPACES and not (rest and head in SPACES.values()) and not re.search(r"[*?[]", head):
            raise _Problem(f"no space is called '{pattern}'{did_you_mean(head, SPACES)}", *at)
        if pattern in patterns[:i]:
            raise _Problem(f"'{pattern}' stands here twice; remove one", *at)
    return patterns


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _named(kind: str) -> tuple[Any, ...]:
    """What makes a field of type Rotator, Selector or Slicer readable and writable by name."""
    write = PlainSerializer(lambda method: method and method.spec(), return_type=Any)
    return BeforeValidator(functools.partial(_method, kind)), write, WithJsonSchema({})


class _Part(BaseModel):
    """No unknown keys, no value turned into another type, nothing changed afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


Word = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=2)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
WORDS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
Spaces = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_spaces), WithJsonSchema(WORDS)]
Rotate = Annotated[Rotator, *_named("rotate")]
Select = Annotated[Selector | None, *_named("select")]
Slice = Annotated[Slicer | None, *_named("slice")]


class Calibrate(_Part):
    """The data on which moments are measured."""

    data: Word  # a hub dataset, a local file, packaged:NAME, or token ids in an .npy
    sequences: Count | None = None  # how many sequences; null for all there are
    tokens: Count | None = None  # how many tokens a sequence has; null for what the data or the model has
    split: Word = "train"  # which split of the data
    batch: Count = 8  # how many sequences pass at a time
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # what the forward pass computes in


class Budget(_Part):
    """What may be stored after slicing."""

    parameters: Fraction  # the fraction kept of the dense model's stored parameters


class Every(_Part):
    """Segments of n blocks each."""

    every: Count  # how many blocks share one basis


Segments = Annotated[
    Annotated[Literal["global", "block", "stage"], Tag("word")] | Annotated[Every, Tag("blocks")],
    Discriminator(lambda value: "blocks" if isinstance(value, dict | Every) else "word"),
]


class Step(_Part):
    """Spaces, the exact basis they get, and how they are cut."""

    spaces: Spaces  # kinds (residual, mlp, vo, qk), names such as mlp.0, or patterns such as mlp.*
    segments: Segments = "global"  # where the stream changes basis: global, block, stage or {every: N}
    slice_head: bool = True  # whether the residual stream is also cut before the head, true or false
    rotate: Rotate = Field(default="identity", validate_default=True)  # which exact basis
    select: Select = None  # how many directions stay
    slice: Slice = None  # how the rest goes; truncate where only `select` is given

    @model_validator(mode="before")
    @classmethod
    def _truncate(cls, value: Any) -> Any:
        cut = isinstance(value, dict) and value.get("select") is not None and value.get("slice") is None
        return {**value, "slice": "truncate"} if cut else value

    @model_validator(mode="after")
    def _consistent(self) -> Step:
        others = [s for s in self.spaces if s != "residual" and not s.startswith("x.")]
        for key in ("segments", "slice_head"):
            if others and getattr(self, key) != Step.model_fields[key].default:
                why = f"it is about the residual stream alone, and the step also has '{others[0]}'"
                raise _Problem(f"{why}. Remove it, or give the residual stream a step of its own", key)
        if self.slice is not None and self.select is None:
            raise _Problem("no `select` says how much to cut. Add one, or remove `slice`", "slice")
        return self

    @property
    def methods(self) -> dict[str, Method]:
        """The step's methods by kind, those that it has."""
        return {kind: method for kind in METHODS if (method := getattr(self, kind)) is not None}


class Perplexity(_Part):
    """The perplexity on held-out tokens."""

    data: Word  # a hub dataset, a local file, packaged:NAME, or token ids in an .npy
    sequences: Count | None = None  # how many sequences; null for all there are
    tokens: Several | None = None  # how many tokens a sequence has; null for what the data or the model has
    split: Word = "test"  # which split of the data
    batch: Count = 8  # how many sequences pass at a time
    name: Word | None = None  # what the report calls it; null for its data

    @property
    def label(self) -> str:
        """What the report calls it."""
        return self.name or self.data


class Evaluate(_Part):
    """One evaluation of the dense and of the sliced model."""

    perplexity: Perplexity  # the data to measure it on, as in {data: wikitext2}


Steps = Annotated[tuple[Step, ...], Field(min_length=1), BeforeValidator(_tuple)]
Evaluations = Annotated[tuple[Evaluate, ...], BeforeValidator(_tuple)]
Order = Literal["oneshot", "sequential", "dense_target"]


class Recipe(_Part):
    """Everything that a run is asked to do."""

    model: Word  # a hub id, a folder, a GGUF file or packaged:NAME
    calibrate: Calibrate | None = None  # the data on which moments are measured, as in {data: wikitext2}
    order: Order = "oneshot"  # calibrate before cutting, behind earlier cuts, or towards the dense stream
    budget: Budget | None = None  # what `select` may spend over all steps, as in {parameters: 0.8}
    tie: Literal["keep", "untie"] = "untie"  # whether tied embeddings stay tied
    seed: Seed = 0  # the seed of all that is random, a whole number from 0
    steps: Steps  # what is done to which spaces, as in [{spaces: residual, rotate: pca}]
    evaluate: Evaluations = ()  # what is measured, as in [{perplexity: {data: wikitext2}}]

    _root: Any = PrivateAttr(default=None)  # the text it was read from

    def __eq__(self, other: object) -> bool:  # wherever they were read from
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    def where(self, *path: str | int) -> str:
        """The file and line (or the flag) at which a part of the recipe stands, or the nearest part above it."""
        node: _Located | None = self._root
        where = node.where if node else "<recipe>"
        for key in path:
            node = node.child(key) if node else None
            where = node.where if node else where
        return where

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for i, step in enumerate(self.steps):
            for kind, method in step.methods.items():
                at = ("steps", i, kind)
                if not self.calibrate and method.needs - {Statistic.READERS}:
                    what = f"'{method.name}' reads moments, and there is no data to measure them on"
                    raise _Problem(f"{what}. Add `calibrate: {{data: ...}}`, or choose another method", *at)
                if not self.budget and isinstance(method, Selector) and method.needs_budget:
                    raise _Problem(f"'{method.name}' spends a budget. Add `budget: {{parameters: ...}}`", *at)
        if self.budget and not any(step.select for step in self.steps):
            raise _Problem("no step spends it. Add `select` to a step, or remove the budget", "budget")
        labels = [e.perplexity.label for e in self.evaluate]
        for i, label in enumerate(labels):
            if label in labels[:i]:
                raise _Problem(f"the report has '{label}' already. Give this one a `name`", "evaluate", i)
        return self

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of ``to_dict``. Raises InputError."""
        return _validate(_located(data, "<recipe>"))

    def to_dict(self) -> dict[str, Any]:
        """The recipe in full, defaults included, as JSON can hold it; methods as a recipe writes them."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_yaml(self) -> str:
        """The recipe in full, as YAML that ``parse_recipe`` reads."""
        yaml, stream = _yaml(), io.StringIO()
        yaml.default_flow_style, yaml.width = False, 4096
        yaml.representer.sort_base_mapping_type_on_output = False
        yaml.dump(self.to_dict(), stream)
        return stream.getvalue()


# --- From text to a tree of values that know where they stand.


@dataclasses.dataclass
class _Located:
    """A value and where it stands: a scalar, or a mapping or list of further located values."""

    value: Any
    where: str  # "path:line", or the flag that set it
    line: int = 0

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value

    def child(self, key: str | int) -> _Located | None:
        if isinstance(self.value, list):
            return self.value[key] if isinstance(key, int) and key < len(self.value) else None
        return self.value.get(key) if isinstance(self.value, dict) else None

    def put(self, key: str | int, child: _Located) -> None:
        if isinstance(self.value, list) and key == len(self.value):
            self.value.append(child)
        else:
            self.value[key] = child


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False
    return yaml


def _parse(text: str, where: Callable[[int], str]) -> _Located | None:
    """The only document in the text, or None if there is none. ``where`` names a line, counted from 1."""
    yaml, depth, line = _yaml(), 0, 1
    try:
        for count, event in enumerate(yaml.parse(text)):  # a stream of events: nothing recurses yet
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            line = event.start_mark.line + 1
            if depth > MAX_DEPTH or count > 3 * MAX_VALUES:
                raise InputError(
                    f"{where(line)}: too deeply nested or too long for a recipe. Is it the right file?"
                )
        root = yaml.compose(text)
        return None if root is None else _Builder(where, yaml.constructor.construct_object).build(root)
    except MarkedYAMLError as e:
        mark, problem = e.problem_mark or e.context_mark, str(e.problem or e.context).removeprefix("but ")
        hints = {r"\t": "Indent with spaces, not tabs", "another document": "Put one recipe in a file"}
        hint = next((hints[k] for k in hints if k in problem), "Check quotes, brackets and indentation")
        raise InputError(f"{where(mark.line + 1 if mark else 1)}: not YAML: {problem}. {hint}.") from None
    except YAMLError as e:  # a character that YAML does not admit
        at = where(text.count("\n", 0, getattr(e, "position", 0)) + 1)
        raise InputError(f"{at}: not YAML: {_first_line(e)}. Recipes are plain text.") from None
    except (ValueError, OverflowError, AssertionError) as e:  # escapes beyond Unicode, odd directives
        raise InputError(f"{where(line)}: not YAML: {e}. Check escapes.") from None


@dataclasses.dataclass
class _Builder:
    """Makes a located tree of a YAML node, once per place where an alias repeats it."""

    where: Callable[[int], str]
    read: Callable[[Any], Any]  # a number, truth value or null from its node
    count: int = 0

    def build(self, node: Any, depth: int = 1) -> _Located:
        line = node.start_mark.line + 1
        at = self.where(line)
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            raise InputError(f"{at}: aliases expand to too many values. Write the recipe without them.")
        if node.tag not in SAFE_TAGS:
            raise InputError(f"{at}: the tag {node.tag}. Recipes are plain data; remove the tag.")
        if isinstance(node, SequenceNode):
            return _Located([self.build(item, depth + 1) for item in node.value], at, line)
        if isinstance(node, MappingNode):
            return _Located(self.entries(node, depth), at, line)
        try:
            return _located(node.value if node.tag in TEXT_TAGS else self.read(node), at, line)
        except (ValueError, LookupError):  # a tag that does not fit, an integer beyond Python's limit
            raise InputError(f"{at}: {_show(node.value)} is no value of its type. Write another.") from None

    def entries(self, node: MappingNode, depth: int) -> dict[str, _Located]:
        entries: dict[str, _Located] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            at = self.where(line)
            if not isinstance(key, ScalarNode) or key.tag not in TEXT_TAGS:
                raise InputError(f"{at}: a key that is not a word. Keys are names, such as `model`.")
            if key.value in entries:
                first = entries[key.value].line
                raise InputError(
                    f"{at}: the key '{key.value}' stands twice, first on line {first}. Keep one."
                )
            entries[key.value] = dataclasses.replace(self.build(item, depth + 1), where=at, line=line)
        return entries


def _located(value: Any, where: str, line: int = 0, depth: int = 1) -> _Located:
    """Plain data as a tree, all of it at one place."""
    if depth > MAX_DEPTH:
        raise InputError(f"{where}: too deeply nested for a recipe.")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: {value} is not a finite number. Write one.")
    if isinstance(value, Mapping):
        value = {str(key): _located(item, where, line, depth + 1) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        value = [_located(item, where, line, depth + 1) for item in value]
    return _Located(value, where, line)


# --- Overrides from the command line.


def _override(root: _Located, assignment: str) -> None:
    """Apply one ``key=value``: set the key, its missing parents created; null removes it."""
    key, equals, text = assignment.partition("=")
    where, path = f"--set {key}", key.split(".")
    if not equals or not all(path) or len(path) > MAX_DEPTH:
        raise InputError(
            f"--set {assignment}: not KEY=VALUE. Write the key dotted, as in steps.0.rotate=pca."
        )
    new = _parse(text, lambda line: where)
    if new is None:
        raise InputError(f"{where}: no value. Write null to remove the key, '' for an empty string.")
    node = root
    for part, following in itertools.pairwise(path):
        slot = _slot(node, part, where)
        child = node.child(slot)
        if child is None or child.value is None:
            if new.value is None:
                return
            child = _Located([] if following.isdigit() else {}, where)
            node.put(slot, child)
        elif part in METHODS and child.value == following:  # a method's bare name, and now an option of it
            child.value = {following: _Located({}, where)}
        node = child
    slot = _slot(node, path[-1], where)
    if new.value is not None:
        node.put(slot, new)
        for rival in _rivals(path):
            node.value.pop(rival, None)
    elif node.child(slot) is not None:
        del node.value[slot]
        node.where, node.line = where, 0


def _slot(node: _Located, part: str, where: str) -> str | int:
    """A part of a dotted key as a key of the node, or as an index of it, at most one past the end."""
    if isinstance(node.value, dict):
        return part
    if not isinstance(node.value, list):
        hint = "Set the key above as a whole, as in steps.0.rotate={pca: {of: raw}}"
        raise InputError(f"{where}: {_show(node.value)} stands above '{part}', and has no keys. {hint}.")
    n = len(node.value)
    if not re.fullmatch("[0-9]{1,5}", part) or int(part) > n:
        raise InputError(f"{where}: '{part}' is no index of {n} items. Count from 0; {n} adds one.")
    return int(part)


def _rivals(path: Sequence[str]) -> set[str]:
    """The options that go when the option at this path is set, as a method takes only one of them."""
    if len(path) != 5 or path[0] != "steps" or path[2] not in METHODS:
        return set()
    cls = registry(path[2]).get(path[3], Method)
    return {o for group in cls.alternatives if path[4] in group for o in group} - {path[4]}


# --- Validation: pydantic's complaints, told at the place in the text.


def _validate(root: _Located) -> Recipe:
    try:
        recipe = Recipe.model_validate(root.plain())
    except ValidationError as e:
        later = {"missing": 1, "too_short": 2}  # they follow from a misspelt key, from an item that is wrong
        told = [(later.get(error["type"], 0), *_explain(error, root)) for error in e.errors()]
        raise InputError(min(told)[-1]) from None
    recipe._root = root
    return recipe


def _explain(error: Any, root: _Located) -> tuple[int, str]:
    """The line of a complaint (0: none), and the message."""
    problem = error.get("ctx", {}).get("error")
    path = (*error["loc"], *getattr(problem, "path", ()))
    node, advice = root, ""
    names: list[str] = []
    model: type[_Part] | None = Recipe
    for key in path:
        if model is not None and key in model.model_fields:
            advice = f". Give {_comments(model).get(key, 'another')}"
            model = _model_in(model.model_fields[key].annotation)
        if (child := node.child(key)) is not None:  # a union's tag and a missing key are not in the text
            node, names = child, [*names, str(key)]
    if error["type"] == "missing":
        text = f"the key '{path[-1]}' is missing{advice}"
    elif error["type"] == "extra_forbidden":
        text = f"unknown key '{path[-1]}'{did_you_mean(str(path[-1]), (model or Recipe).model_fields)}"
    else:
        text = _should(error) + ("" if problem else advice)
    dotted = ".".join(names)
    place = node.where if not dotted or node.where == f"--set {dotted}" else f"{node.where}: {dotted}"
    return node.line, f"{place}: {text}" + ("" if text.endswith(("?", ".")) else ".")


def _should(error: Any) -> str:
    """One of pydantic's complaints: what was given, and what it should be."""
    if error["type"] in ("value_error", "assertion_error"):
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"the option '{error['loc'][-1]}' is missing"
    ours = {"model_type": "be a mapping", "tuple_type": "be a list", "too_short": "have at least one item"}
    should = ours.get(error["type"]) or re.sub(r"^\w+ should ", "", error["msg"])
    return f"got {_show(error['input'])}, but it should {should}"


def _show(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(e: Exception) -> str:
    return str(e).partition("\n")[0] or type(e).__name__


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, _Part):
        return annotation
    return next((found for found in map(_model_in, get_args(annotation)) if found), None)


@functools.cache
def _comments(cls: type) -> dict[str, str]:
    """What the source says of each field: the comment that ends its line."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
        return dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))
    except (OSError, TypeError):  # a class whose source is not to be had
        return {}


# --- What others call.


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file, then apply ``key=value`` overrides. Raises InputError."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise InputError(f"{path}: larger than 1 MiB; a recipe takes a page. Is it the right file?")
        text = raw.decode("utf-8")
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise InputError(f"{path}: no such file{near}") from None
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text. Save it as UTF-8, or name another file.") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: {getattr(e, 'strerror', e)}. Give the path of a YAML file.") from None
    return parse_recipe(text, str(path), overrides)


def parse_recipe(text: str, where: str = "<recipe>", overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML text, then apply ``key=value`` overrides. Raises InputError."""
    root = _parse(text, lambda line: f"{where}:{line}")
    if root is None or root.value is None:
        raise InputError(f"{where}:1: empty. Write at least `model` and `steps`.")
    if not isinstance(root.value, dict):
        raise InputError(
            f"{root.where}: got {_show(root.value)}, but a recipe is a mapping of keys to values."
        )
    for assignment in overrides:
        _override(root, assignment)
    return _validate(root)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors, with every registered method and its options."""
    schema = _described(Recipe, Recipe.model_json_schema())
    definitions = schema["$defs"]
    for model in _Part.__subclasses__():
        if model.__name__ in definitions:
            _described(model, definitions[model.__name__])
    for kind in METHODS:
        choices = definitions["Step"]["properties"][kind]["anyOf"] = []
        for name, cls in sorted(registry(kind).items()):
            try:
                options = TypeAdapter(cls).json_schema(ref_template=f"#/$defs/{name}.{{model}}")
            except (PydanticUserError, NameError) as e:
                raise InputError(
                    f"{kind} method '{name}': options without a schema: {_first_line(e)}"
                ) from None
            definitions |= {f"{name}.{key}": value for key, value in options.pop("$defs", {}).items()}
            options = _described(cls, options) | {
                "additionalProperties": False,
                "description": inspect.getdoc(cls),
            }
            closed = {"type": "object", "required": [name], "additionalProperties": False}
            choices += [
                {"const": name, "description": inspect.getdoc(cls)},
                {**closed, "properties": {name: options}},
            ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _described(cls: type, schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a class, its comments written in as the descriptions of its properties."""
    for key, text in _comments(cls).items():
        if key in schema.get("properties", {}):
            schema["properties"][key]["description"] = text
    return schema
