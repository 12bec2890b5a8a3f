"""Pydantic's complaints, told at the place in the text: where, what was given, what it should be."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ..core.errors import InputError, did_you_mean
from .yaml_text import Located, show

M = TypeVar("M", bound=BaseModel)


FIELD = re.compile(  # a field's name, and the comment that ends it, on whichever of its lines
    r"^    (\w+): (?:(?!\n    [\w@]).)*?  # ([^\n]+)$", re.MULTILINE | re.DOTALL
)


class Problem(ValueError):
    """What is wrong, at a path below the value that is being validated."""

    def __init__(self, message: str, *path: str | int):
        super().__init__(message)
        self.path = path


def validate(model: type[M], root: Located) -> M:
    """The model of a tree of values. Raises InputError with the first complaint, at its place."""
    try:
        return model.model_validate(root.plain())
    except ValidationError as e:
        later = {
            "missing": 1,
            "too_short": 2,
        }  # they follow from a misspelt key, from an item that is wrong
        told = [
            (later.get(error["type"], 0), *_explain(error, root, model)) for error in e.errors()
        ]
        raise InputError(min(told)[-1]) from None


def _explain(error: Any, root: Located, top: type[BaseModel]) -> tuple[int, str]:
    """The line of a complaint (0: none), and the message."""
    problem = error.get("ctx", {}).get("error")
    path = (*error["loc"], *getattr(problem, "path", ()))
    node, advice = root, ""
    names: list[str] = []
    model: type[BaseModel] | None = top
    for key in path:
        if model is not None and key in model.model_fields:
            advice = f". Give {comments(model).get(key, 'another')}"
            model = _model_in(model.model_fields[key].annotation)
        if (
            child := node.child(key)
        ) is not None:  # a union's tag and a missing key are not in the text
            node, names = child, [*names, str(key)]
    if error["type"] == "missing":
        text = f"the key '{path[-1]}' is missing{advice}"
    elif error["type"] == "extra_forbidden":
        text = f"unknown key '{path[-1]}'{did_you_mean(str(path[-1]), (model or top).model_fields)}"
    else:
        text = should(error) + ("" if problem else advice)
    dotted = ".".join(names)
    place = (
        node.where if not dotted or node.where == f"--set {dotted}" else f"{node.where}: {dotted}"
    )
    return node.line, f"{place}: {text}" + ("" if text.endswith(("?", ".")) else ".")


def should(error: Any) -> str:
    """One of pydantic's complaints: what was given, and what it should be."""
    if error["type"] in ("value_error", "assertion_error"):
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"the option '{error['loc'][-1]}' is missing"
    ours = {
        "model_type": "be a mapping",
        "tuple_type": "be a list",
        "too_short": "have at least one item",
    }
    wanted = ours.get(error["type"]) or re.sub(r"^\w+ should ", "", error["msg"])
    return f"got {show(error['input'])}, but it should {wanted}"


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for found in map(_model_in, get_args(annotation)) if found), None)


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """What the source says of each field, inherited ones too: the comment that ends it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(base))
            found |= FIELD.findall(source)
        except (OSError, TypeError):  # a class whose source is not to be had
            continue
    return found
