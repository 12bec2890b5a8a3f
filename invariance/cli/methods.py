"""The commands on what a recipe can say: its methods, and its JSON Schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.text import Text

from ..core.errors import InputError
from .terminal import Json, say


def methods(
    name: Annotated[
        str | None, typer.Argument(help="One method, with its whole manual page.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the rotators, selectors and slicers that a recipe can name, with their options."""
    from ..method.manual import pages
    from ..report.grid import Grid

    known = pages()
    if name is not None:
        found = [p for p in known if p["name"] == name]
        if not found:
            from ..core.errors import did_you_mean

            raise InputError(
                f"no method is called '{name}'{did_you_mean(name, [p['name'] for p in known])}"
            )
        page = found[0]
        options = "".join(f"\n  {o['name']}: {o['type']} = {o['default']}" for o in page["options"])
        text = f"{page['kind']}: {name}\n\n{page['doc']}\n\noptions:{options or ' none'}"
        say(page, as_json, Text(text))  # not markup: [x xᵀ] is mathematics
        return
    taken = {p["name"]: ", ".join(o["name"] for o in p["options"]) for p in known}
    rows = [[p["kind"], p["name"], p["doc"].splitlines()[0], taken[p["name"]]] for p in known]
    listing = Grid("Methods.", ["kind", "name", "what it does", "options"], rows, 4)
    say(known, as_json, listing.table())


def schema(as_json: Json = True) -> None:
    """Print the JSON Schema of recipes, for editors and other programs: always one JSON document."""
    from ..recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
