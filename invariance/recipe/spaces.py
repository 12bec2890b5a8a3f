"""How a step names spaces: kinds, names or glob patterns."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from ..core.errors import did_you_mean
from .complaints import Problem
from .yaml_text import show

SPACES = {
    "residual": "x",
    "mlp": "mlp",
    "vo": "vo",
    "qk": "qk",
    "heads": "heads",
    "edge": "edge",
    "experts": "experts",
}  # a kind, and how names of its spaces begin


def _spaces(value: Any) -> tuple[str, ...]:
    """Kinds, names or glob patterns, each of them one that some model could have."""
    patterns = tuple(value) if isinstance(value, list | tuple) else (value,)
    for i, pattern in enumerate(patterns):
        at = (i,) if isinstance(value, list) else ()
        if not isinstance(pattern, str):
            raise Problem(f"got {show(pattern)}; write a space's kind, a name or a pattern", *at)
        head, _, rest = pattern.partition(".")
        if (
            pattern not in SPACES
            and not (rest and head in SPACES.values())
            and not re.search(r"[*?[]", head)
        ):
            raise Problem(f"no space is called '{pattern}'{did_you_mean(head, SPACES)}", *at)
        if pattern in patterns[:i]:
            raise Problem(f"'{pattern}' stands here twice; remove one", *at)
    return patterns


WORDS = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]
}
Spaces = Annotated[
    tuple[str, ...], Field(min_length=1), BeforeValidator(_spaces), WithJsonSchema(WORDS)
]
