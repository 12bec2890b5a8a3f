"""The command on model types: what is derived and certified of each."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .terminal import Json, err, say


def families(
    types: Annotated[
        list[str] | None,
        typer.Argument(metavar="TYPE", help="Model types; all causal ones if none is named."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the page, as docs/families.md has it, to this file.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="How many processes work at once.", min=1, max=1024)
    ] = 2,
    as_json: Json = False,
) -> None:
    """Derive the spaces of model types from tiny random models, and certify them: a row a type.

    Needs no weights and no hub. A few seconds a type; all of them take half an hour on two cores.
    """
    from ..core.signed import check_page, write_page
    from ..model import survey

    if output is not None:
        check_page(output, "--output")
    rows = []
    for row in survey.families(types or None, jobs=jobs):
        rows.append(row)
        told = ", ".join(row.spaces) if row.certified else f"refused: {row.reason}"
        err.print(f"{row.type}: {told}", markup=False, highlight=False, soft_wrap=True)
    if output is not None:
        write_page(output, survey.page(rows), "--output")
    if as_json:
        say([asdict(row) for row in rows], as_json)
    else:
        typer.echo(survey.table(rows))  # lines of a table must not be broken
