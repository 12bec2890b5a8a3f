"""What commands share: their arguments, progress bars, and one JSON document or something to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..core.errors import InputError

out, err = Console(), Console(stderr=True)

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe, a YAML file (see `invariance schema`).")
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a folder, a .gguf file or packaged:NAME.")
]
Set = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the recipe, such as "
        "`steps.0.select.uniform.width=432`. May stand several times.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda. auto takes cuda where there is one.")]
Plugin = Annotated[
    list[str],
    typer.Option(
        "--plugin",
        metavar="MODULE",
        help="Import a module, or a .py file, that registers methods or models. May stand several times.",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Let transformers run code that comes with the model."
    ),
]
TrustTasks = Annotated[
    bool,
    typer.Option(
        "--trust-task-code",
        help="Read task files of one's own, which can run any program. Read them first.",
    ),
]


def progress(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    """A bar with the time left, on standard error."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        yield from bar.track(items, total=total, description=what)


def device_named(name: str) -> str:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name}: not a device that is known. Say auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: this machine has no CUDA device that torch can use. Say auto or cpu."
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def say(document: Any, as_json: bool, *readable: Any) -> None:
    """One JSON document, or something to read."""
    from ..core.files import finite

    if as_json:
        print(json.dumps(finite(document), indent=2))
    else:
        out.print(*readable)


@contextmanager
def library(plugin: list[str], trust_task_code: bool = False) -> Iterator[None]:
    """The library with its public names, its methods and those of plugins; transformers keeps quiet meanwhile."""
    from .. import publish

    publish()
    from ..io.hub import quiet
    from ..measure.trust import trusting
    from ..method.interfaces import load_plugin

    for module in plugin:
        load_plugin(module)
    with quiet(), trusting(trust_task_code):
        yield
