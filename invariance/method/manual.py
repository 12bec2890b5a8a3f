"""The manual pages of the registered methods, made from their docstrings and fields."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from .interfaces import registry

HEADINGS = {
    "rotate": "Rotators",
    "joint": "Joint methods",
    "select": "Selectors",
    "slice": "Slicers",
    "round": "Roundings",
}


def pages() -> list[dict[str, Any]]:
    """One mapping a method: kind, name, doc, options (name, type, default)."""
    return [
        {
            "kind": kind,
            "name": name,
            "doc": inspect.getdoc(cls) or "",
            "options": [
                {"name": f.name, "type": str(f.type), "default": f.default}
                for f in dataclasses.fields(cls)
                if f.init and f.default is not dataclasses.MISSING
            ],
        }
        for kind in HEADINGS
        for name, cls in sorted(registry(kind).items())
    ]


SHIPPED = "invariance.methods"  # plugins have pages of their own


def markdown() -> str:
    """The methods page of the documentation."""
    lines = [
        "# Methods",
        "",
        "Made by `python -m invariance.method.manual > docs/methods.md` from the docstrings; edit those.",
        "",
    ]
    for kind, heading in HEADINGS.items():
        lines += [f"## {heading}: `{kind}`", ""]
        shipped = {n for n, c in registry(kind).items() if c.__module__.startswith(SHIPPED)}
        for page in (p for p in pages() if p["kind"] == kind and p["name"] in shipped):
            lines += [f"### `{page['name']}`", "", page["doc"], ""]
            if page["options"]:
                lines += ["| option | type | default |", "|---|---|---|"]
                lines += [
                    f"| `{o['name']}` | `{o['type']}` | `{o['default']}` |".replace(
                        " | None", " or None"
                    )
                    for o in page["options"]
                ]
                lines += [""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
