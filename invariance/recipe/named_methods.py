"""Methods as a recipe names them: read, written and described by their names and options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
import re
from typing import Any

from pydantic import (
    BeforeValidator,
    PlainSerializer,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)

from ..core.errors import InputError, did_you_mean
from ..method.interfaces import BASING, Method, find, registry
from .complaints import Problem, comments, should
from .yaml_text import first_line, show

METHODS = ("rotate", "select", "slice")  # of a step
PLACES = {"rotate": BASING}  # the kinds of methods that a key may name, where there are several
ROUND = "round"  # of `quantize`


def named(kind: str) -> tuple[Any, ...]:
    """What makes a field of type Rotator, Selector or Slicer readable and writable by name."""
    write = PlainSerializer(lambda method: method and method.spec(), return_type=Any)
    return BeforeValidator(functools.partial(_method, kind)), write, WithJsonSchema({})


def method(kind: str, value: Any, where: str) -> Any:
    """A method as a recipe writes it, or an instance as it is. Raises InputError."""
    try:
        made = _method(kind, value)
    except Problem as e:
        raise InputError(f"{where}: {e}.") from None
    if made is None or made.kind != kind:
        raise InputError(f"{where}: got {show(value)}; give a method of the kind '{kind}'.")
    return made


def _method(kind: str, value: Any) -> Any:
    """A method's instance from its name or ``{name: {option: value}}``."""
    if isinstance(value, Method) or (value is None and kind != "rotate"):
        return value
    given = {value: None} if isinstance(value, str) else value
    if not isinstance(given, dict) or not given:
        raise Problem(f"got {show(value)}; write a method as NAME or {{NAME: {{OPTION: VALUE}}}}")
    (name, options), *others = given.items()
    if unknown := next((n for n in given if n not in _known(kind)), None):
        name, options = unknown, None  # which is what has to be told, whatever stands beside it
    elif others:
        raise Problem(f"'{name}' stands here already; keep one method", others[0][0])
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise Problem(f"got {show(options)}; write options as {{{name}: {{OPTION: VALUE}}}}", name)
    try:
        cls = _known(kind).get(name) or find(kind, name)
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        for option in options:
            if option not in known:
                raise Problem(
                    f"'{name}' has no option '{option}'{did_you_mean(option, known)}", name, option
                )
        for group in cls.alternatives:
            if len(both := [option for option in options if option in group]) > 1:
                raise Problem(
                    f"'{both[0]}' and '{both[1]}' exclude each other; keep one", name, both[1]
                )
        return TypeAdapter(cls).validate_json(json.dumps(options, allow_nan=False), strict=True)
    except ValidationError as e:
        error = e.errors()[0]
        told = (option for option in options if re.search(rf"\b{option}\b", error["msg"]))
        raise Problem(should(error), name, *(error["loc"] or itertools.islice(told, 1))) from None
    except Problem:
        raise
    except (
        InputError,
        TypeError,
        ValueError,
        NameError,
        PydanticUserError,
    ) as e:  # also a faulty plugin's
        raise Problem(first_line(e), name) from None


def _known(kind: str) -> dict[str, type[Any]]:
    """The methods that a key may name."""
    return {n: cls for k in PLACES.get(kind, (kind,)) for n, cls in registry(k).items()}


def choices(kind: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a JSON Schema says of a kind of methods: the ways to write one, and the definitions that these use."""
    found: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for name, cls in sorted(_known(kind).items()):
        try:
            options = TypeAdapter(cls).json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        except (PydanticUserError, NameError) as e:
            raise InputError(
                f"{kind} method '{name}': options without a schema: {first_line(e)}"
            ) from None
        definitions |= {f"{name}.{key}": value for key, value in options.pop("$defs", {}).items()}
        options = described(cls, options) | {
            "additionalProperties": False,
            "description": inspect.getdoc(cls),
        }
        closed = {"type": "object", "required": [name], "additionalProperties": False}
        found += [
            {"const": name, "description": inspect.getdoc(cls)},
            {**closed, "properties": {name: options}},
        ]
    return found, definitions


def described(cls: type, schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a class, its comments written in as the descriptions of its properties."""
    for key, text in comments(cls).items():
        if key in schema.get("properties", {}):
            schema["properties"][key]["description"] = text
    return schema
