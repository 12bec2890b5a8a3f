"""The command line: parse, call, print. Exit status 0 done, 1 failed, 2 the input was wrong."""

from __future__ import annotations

import functools
import inspect as inspection
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import typer

from . import ablate, compress, families, measure, methods, recover, spaces
from .leave import leaving
from .terminal import Plugin, library

# All else that is ours is imported where it is used: torch takes seconds, and `--help` needs none of it.

app = typer.Typer(
    name="invariance",
    help="Compress language models by exact changes of basis and cuts in the new bases.\n\n"
    "Begin with `invariance inspect MODEL` (what is there), `invariance plan RECIPE` (what would happen) and "
    "`invariance run RECIPE` (do it). A MODEL is a hub id, a local folder, a .gguf file or "
    "`packaged:smollm2-135m-instruct`. Recipes that ship: recipes/*.yaml.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command of the program, in which transformers keeps quiet. Each takes `--plugin`."""
    return app.command()(_with_plugins(function, ready=True))


def answering(function: Callable[..., None]) -> Callable[..., None]:
    """A command that may know its answer; where it does not, it gets the library ready itself."""
    return app.command()(_with_plugins(function, ready=False))


def _with_plugins(function: Callable[..., None], ready: bool) -> Callable[..., None]:
    own = inspection.signature(function, eval_str=True)
    takes = "plugin" in own.parameters  # for what it hands on to other processes

    @functools.wraps(function)
    def called(plugin: list[str], **kwargs: Any) -> None:
        trust = kwargs.get("trust_task_code", False)
        with library(plugin, trust) if ready else nullcontext():
            function(**kwargs, **({"plugin": plugin} if takes else {}))

    option = inspection.Parameter(
        "plugin", inspection.Parameter.KEYWORD_ONLY, default=[], annotation=Plugin
    )
    others = [p for name, p in own.parameters.items() if name != "plugin"]
    told = own.replace(parameters=[p.replace(kind=option.kind) for p in (*others, option)])
    called.__signature__ = told  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in told.parameters.values()}
    return called


command(compress.run)
answering(compress.plan)
command(spaces.verify)
answering(spaces.inspect)
command(measure.evaluate)
command(measure.bench)
command(ablate.ablate)
command(ablate.compare)
command(families.families)
command(compress.extract)
command(recover.recover)
command(methods.methods)
command(methods.schema)


def main() -> None:
    """The entry point."""
    leaving(lambda: app(standalone_mode=True))
