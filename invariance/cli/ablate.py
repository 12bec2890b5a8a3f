"""The commands on many runs: `ablate`, which makes them, and `compare`, which sets reports side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import InputError
from .terminal import (
    Device,
    Json,
    Plugin,
    Set,
    Trust,
    TrustTasks,
    device_named,
    err,
    out,
    progress,
    say,
)

MANY = 1024  # processes

if TYPE_CHECKING:
    from ..study.ablate import Ablation
    from ..study.runners import Runner
    from ..study.table import Row


def ablate(
    study: Annotated[
        Path,
        typer.Argument(
            metavar="STUDY", help="A study, a YAML file: a base recipe and what varies."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The study's folder; by default runs/STUDY's name. Runs that "
            "are there already are not repeated."
        ),
    ] = None,
    set_: Set = [],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    workers: Annotated[
        int,
        typer.Option(
            help="How many runs at a time, each in a process of its own. With "
            "--ray: how many trials of a search; a grid sends all.",
            min=1,
            max=MANY,
        ),
    ] = 1,
    processes: Annotated[
        int, typer.Option(help="How many processes calibrate together.", min=1, max=MANY)
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Send runs to this Ray cluster (HOST:PORT, or `local`), a process each.",
        ),
    ] = None,
    cpus: Annotated[
        float | None, typer.Option(help="With --ray: CPUs that a run holds; 1 if not said.", min=0)
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(help="With --ray: GPUs that a run holds; 0 if not said.", min=0)
    ] = None,
    logger: Annotated[
        list[str],
        typer.Option(
            help="Also log every run: tensorboard, wandb, mlflow or csv. May stand several times."
        ),
    ] = [],
    latex: Annotated[
        bool,
        typer.Option(
            "--latex", help="Also write results.tex, a LaTeX table with standard errors over seeds."
        ),
    ] = False,
    device: Device = "auto",
    plugin: Plugin = [],
    trust_remote_code: Trust = False,
    trust_task_code: TrustTasks = False,
    as_json: Json = False,
) -> None:
    """Change one thing, hold the rest: run every recipe of a study, and set the results in a table and on a page.

    `base` names a recipe; `grid` (all combinations), `zip` (together) or `search` (Optuna) say what varies. Every recipe is
    planned before anything runs. What runs share is computed once: moments, bases, the dense model's perplexity. Interrupt
    it when you like: finished runs are kept, and the same command goes on. Writes results.parquet, results.csv and
    study.html, and its figures as SVG and PDF in figures/. Studies that ship: recipes/ablations.
    """
    from ..compress.execution import Execution
    from ..core.outputs import alone
    from ..study import ablate as studies
    from ..study.log import check, log
    from ..study.runners import chosen
    from ..study.study import load_study
    from ..study.table import terminal

    for name in logger:
        check(name)
    _check_cluster(ray, cpus, gpus)
    found = load_study(study, set_)
    folder = Path(os.path.abspath(output or Path("runs") / study.stem))
    studies.folder_of(folder).check()
    execution = Execution(
        device_named(device),
        trust_remote_code,
        tuple(plugin),
        found.options.speed,
        processes,
        max((os.cpu_count() or 1) // workers, 1) if workers > 1 and ray is None else None,
        trust_task_code,
    )
    ablation = studies.Ablation(
        found,
        folder,
        execution,
        lambda line: err.print(line, highlight=False, markup=False),
        latex=latex,
    )
    outlook = ablation.outlook()
    if not as_json or not dry_run:
        (out if dry_run else err).print(studies.plan_table(ablation, outlook))
    if dry_run:
        if as_json:
            say({"study": found.name, **outlook.to_dict(), "rows": ablation.rows()}, True)
        return
    runner = chosen(execution, progress, workers, ray, 1 if cpus is None else cpus, gpus or 0)
    with alone(folder):
        rows = _carry_out(ablation, runner, workers, ray is not None)
    log(logger, folder, found, rows)
    table = terminal(found.name, found.titles, rows)
    say(
        {"study": found.name, "output": str(folder), "rows": rows},
        as_json,
        table,
        f"page  {folder / 'study.html'}",
    )
    _tell_failures(ablation, rows)


def _check_cluster(ray: str | None, cpus: float | None, gpus: float | None) -> None:
    """Raises InputError for what a run would hold of a cluster that is not named."""
    for flag, value in (("--cpus", cpus), ("--gpus", gpus)):
        if value is not None and ray is None:
            raise InputError(
                f"{flag} {value:g}: what a run holds of a cluster, and there is none. Add --ray, or leave it out."
            )


def _tell_failures(ablation: Ablation, rows: list[Row]) -> None:
    """Leave with status 1 where runs failed, or none could be run."""
    from ..study.table import DONE

    failed = len(ablation.failed)
    if failed or not any(r["status"] == DONE for r in rows):
        said = (
            f"{failed} of {len(ablation.jobs)} runs failed" if failed else "no trial could be run"
        )
        err.print(f"{said}; their reasons stand above and in results.csv", highlight=False)
        raise typer.Exit(1)


def _carry_out(ablation: Ablation, runner: Runner, workers: int, elsewhere: bool) -> list[Row]:
    """The study in its folder: run what is missing, and write what there is, whatever stops it."""
    trials = None
    if ablation.study.searched:
        from ..study.search import opened, search

        trials = opened(ablation, workers, elsewhere)
    ablation.begin()
    try:
        if trials is not None:
            search(ablation, trials, runner, workers, progress)
        else:
            ablation.run(runner)
    finally:
        rows = ablation.write()
    return rows


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folders of runs, or their report.json; two at least."),
    ],
    html: Annotated[
        Path | None, typer.Option(help="Also write the comparison as one page, to this file.")
    ] = None,
    latex: Annotated[
        Path | None,
        typer.Option(help="Also write a LaTeX table with standard errors, to this file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Set reports side by side: sizes, costs, perplexities, widths and energies layer by layer, texts. The first is the measure.

    For example `invariance compare runs/demo runs/slicegpt --html both.html`.
    """
    from ..core.signed import TEX, check_page, write_page
    from ..report import compare as comparing
    from ..report.grid import NEEDS

    files = [("--html", html), ("--latex", latex)]
    for flag, file in files:
        if file is not None:
            check_page(file, flag)
    if html is not None and latex is not None and html.resolve() == latex.resolve():
        raise InputError(f"--latex {latex}: --html names the same file. Name two.")
    found = comparing.load(runs)
    if html is not None:
        write_page(html, comparing.page(found), "--html")
    if latex is not None:
        write_page(latex, NEEDS + comparing.latex(found).latex(), "--latex", TEX)
    say(comparing.document(found), as_json, *([] if as_json else comparing.tables(found)))
