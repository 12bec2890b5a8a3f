"""The commands that compress by a recipe: what it would do, doing it, and one member of what it made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import (
    Device,
    Json,
    RecipeArgument,
    Set,
    Trust,
    TrustTasks,
    device_named,
    library,
    progress,
    say,
)


def run(
    recipe: RecipeArgument,
    output: Annotated[
        Path | None, typer.Option(help="The folder to write; by default runs/RECIPE's name.")
    ] = None,
    set_: Set = [],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run's folder.")
    ] = False,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    trust_task_code: TrustTasks = False,
    as_json: Json = False,
) -> None:
    """Compress a model by a recipe: writes model/, report.json and report.html.

    Stops, and writes nothing, if a rotation moves the logits. Moments of the dense model are kept, so a second
    recipe on the same model and tokens calibrates in no time.
    """
    from ..report.document import Report
    from ..report.page import table
    from ..report.reading import checked
    from ..run import run as runs

    report = runs.run(
        recipe,
        output or Path("runs") / recipe.stem,
        set_,
        device=device_named(device),
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    say(report, as_json, *([] if as_json else [table(checked(Report, report, "report"))]))


def plan(
    recipe: RecipeArgument,
    set_: Set = [],
    trust_remote_code: Trust = False,
    as_json: Json = False,
    plugin: list[str] = [],
) -> None:
    """Show what a recipe would do: spaces, groups, widths and costs. Reads no weights."""
    from ..report.plans import plan as tables
    from .answers import Question, answer

    def find() -> dict[str, Any]:
        with library(plugin):
            from ..run.planned import planned

            return planned(recipe, set_, trust_remote_code=trust_remote_code, progress=progress)

    asked = Question("plan", recipe, set_)
    document = find() if plugin or trust_remote_code else answer(asked, find)
    say(document, as_json, *([] if as_json else tables(document)))


def extract(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="What a recipe with `nested` wrote: the run's folder, or its model/.",
        ),
    ],
    width: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Which member, by its share of the budget's "
            "resource, such as 0.8. One that is not there is answered by a list.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier one.")] = False,
    as_json: Json = False,
) -> None:
    """Make one member of a nested family a checkpoint of its own: stock, where its widths allow it.

    A recipe with `budget: {parameters: 0.9}` and `nested: [0.8, 0.7]` writes one model whose first directions are the
    narrower ones. `invariance extract runs/family --width 0.8 -o runs/family-0.8` writes model/ and, where the family has
    a report, that of the member. Nothing is computed again.
    """
    from ..run.extract import run as make

    made = make(folder, width, output, overwrite=overwrite, progress=progress)
    why = (
        f"not stock: {made['why_not_stock']}"
        if made["why_not_stock"]
        else "plain transformers loads it"
    )
    say(
        made,
        as_json,
        f"{made['parameters']:,} parameters as '{made['exported_as']}', {why}\ncheckpoint  {made['output']}/model",
    )
