"""The JSON Schema of recipes, for editors and other programs."""

from __future__ import annotations

from typing import Any

from ..core.parts import Part
from .named_methods import METHODS, ROUND, choices, described
from .recipe import Recipe


def _parts(cls: type[Part]) -> list[type[Part]]:
    return [model for sub in cls.__subclasses__() for model in (sub, *_parts(sub))]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors, with every registered method and its options."""
    schema = described(Recipe, Recipe.model_json_schema())
    definitions = schema["$defs"]
    for model in _parts(Part):
        if model.__name__ in definitions:
            described(model, definitions[model.__name__])
    for kind in METHODS:
        definitions["Step"]["properties"][kind]["anyOf"], more = choices(kind)
        definitions |= more
    definitions["Quantize"]["properties"][ROUND]["anyOf"], more = choices(ROUND)
    definitions |= more
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
