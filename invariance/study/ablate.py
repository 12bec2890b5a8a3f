"""Ablation studies: plan every run, compute once what they share, run what is missing, and show the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..compress.execution import Execution
from ..core.files import replacing, write_json, write_text
from ..core.growing import Growing
from ..core.progress import Progress, quiet
from ..report import reading
from ..report.document import Report
from ..report.grid import NEEDS
from ..report.units import size
from . import table as tables
from .factors import Alternative
from .job import PRUNED, Answer
from .kept import spectra_of
from .plan import Job, Outlook, Planner, finished, outlook, preparations, samples, told
from .runners import Runner
from .study import Study, Variant, check_measured
from .table import Row

PRODUCTS = (
    "study.yaml",
    "results.parquet",
    "results.csv",
    "study.html",
    *(f"figures/{name}.{kind}" for name in ("front", "curves") for kind in ("svg", "pdf")),
)
Tell = Callable[[str], None]


@dataclass
class Ablation:
    """A study, its folder, and how far it is. Every finished run is a folder ``runs/KEY`` that appeared whole."""

    study: Study
    output: Path
    execution: Execution
    tell: Tell = print
    progress: Progress = quiet
    latex: bool = False  # whether results.tex is written too
    variants: list[Variant] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)  # fewer: variants of one recipe are one
    failures: dict[str, str] = field(default_factory=dict)  # run → reason
    refused: list[Row] = field(default_factory=list)  # what a search proposed and no run can have

    def __post_init__(self) -> None:
        self.planner = Planner(self.execution)
        self.samples: list[Job] = []  # of what a search may propose
        if self.study.searched:
            self.samples = samples(self.planner, self.study)
        else:
            self.variants = self.study.variants()
            self.jobs = self.planner.jobs(self.variants, self.progress)
        check_measured(self.study, [job.recipe for job in self.samples or self.jobs])

    @property
    def runs(self) -> Path:
        return self.output / "runs"

    @property
    def missing(self) -> list[Job]:
        done = finished(self.runs, self.jobs)
        return [job for job in self.jobs if job.key not in done]

    @property
    def failed(self) -> list[str]:
        """The runs that failed; those that a search stopped early did not."""
        return [key for key, reason in self.failures.items() if not reason.startswith(PRUNED)]

    def outlook(self) -> Outlook:
        """What is going to be done."""
        if search := self.study.options.search:
            return outlook(self.samples[:1], {}, search.trials)
        done = finished(self.runs, self.jobs)
        return outlook(
            self.jobs,
            {key: {"seconds": reading.read(folder).seconds} for key, folder in done.items()},
        )

    def run(self, runner: Runner) -> None:
        """Carry out what is missing, model by model. Failures are kept with their reasons, and do not stop the rest."""
        missing = self.missing
        for model in dict.fromkeys(job.recipe.model for job in missing):
            jobs = [job for job in missing if job.recipe.model == model]
            for answer in runner(preparations(jobs)):
                if answer.reason:
                    self.tell(
                        f"{answer.request.name}: {answer.reason}; every run will try for itself"
                    )
            self.carry_out(jobs, runner)

    def carry_out(self, jobs: Sequence[Job], runner: Runner) -> None:
        """Runs of one model, each kept as soon as it is there."""
        by_key = {job.key: job for job in jobs}
        for n, answer in enumerate(runner([job.request for job in jobs]), 1):
            self.keep(by_key[answer.request.name], answer, f"{n}/{len(jobs)}")

    def keep(self, job: Job, answer: Answer, count: str) -> None:
        """A run's folder, or the reason why there is none; one line on it."""
        varied = told(job.variants[0].varied)
        if answer.report is None:
            self.failures[job.key] = answer.reason or "no reason given"
            if answer.details:
                write_text(self.output / "failed" / f"{job.key}.txt", answer.details)
            self.tell(f"{count}  {varied}: {self.failures[job.key]}")
            return
        folder = self.runs / job.key
        answer.report["output"] = str(folder)
        report = reading.checked(Report, answer.report, job.key)
        (self.output / "failed" / f"{job.key}.txt").unlink(missing_ok=True)  # of an earlier try
        with replacing(folder) as made:
            made.mkdir()
            write_text(made / "recipe.yaml", job.recipe.to_yaml())
            write_json(made / "spectra.json", answer.spectra)
            write_json(made / "report.json", answer.report)
        found = tables.row(job.key, {}, report, tables.DONE)
        self.tell(
            f"{count}  {varied}: perplexity {tables.cell('perplexity', found.get('perplexity'))}, "
            f"{tables.cell('parameters', found['parameters'])} parameters, {found['seconds']:.1f} s"
        )

    def refuse(self, chosen: Mapping[str, Alternative], reason: str) -> None:
        """Keep why what a search proposed cannot be run."""
        row = tables.row(
            "", {name: a.label for name, a in chosen.items()}, None, tables.FAILED, reason
        )
        if row not in self.refused:
            self.refused.append(row)

    def rows(self) -> list[Row]:
        """One row a variant, in the study's order; behind them those that cannot be run."""
        done = finished(self.runs, self.jobs)
        rows = {
            variant: self._row(job, variant, done.get(job.key))
            for job in self.jobs
            for variant in job.variants
        }
        return [*(rows[variant] for variant in self.variants), *self.refused]

    def _row(self, job: Job, variant: Variant, folder: Path | None) -> Row:
        if folder is not None:
            return tables.row(job.key, variant.varied, reading.read(folder), tables.DONE)
        reason = self.failures.get(job.key, "")
        status = (
            tables.PRUNED
            if reason.startswith(PRUNED)
            else tables.FAILED
            if reason
            else tables.WAITING
        )
        return tables.row(job.key, variant.varied, None, status, reason)

    def write(self) -> list[Row]:
        """results.parquet, results.csv, study.html and its figures as files of their own, of what there is so far."""
        from ..report.figures import write as write_figures
        from .page import Results, figures, page

        rows = self.rows()
        done = finished(self.runs, self.jobs)
        reports = {key: reading.read(folder) for key, folder in done.items()}
        spectra = {key: spectra_of(folder) for key, folder in done.items()}
        found = Results(self.study, rows, reports, spectra)
        drawn = figures(found)
        with folder_of(self.output).filling() as made:
            tables.write(made, rows)
            write_text(made / "study.html", page(found, drawn))
            write_figures(made / "figures", drawn)
            if self.latex:
                grid = tables.latex(self.study.name, self.study.titles, rows)
                write_text(made / "results.tex", NEEDS + grid.latex())
        return rows

    def begin(self) -> None:
        """Make the folder, and write the study into it. Raises InputError where something else is there."""
        folder_of(self.output).begin()
        with folder_of(self.output).filling() as made:
            write_text(made / "study.yaml", self.study.to_yaml())


def folder_of(output: Path) -> Growing:
    """A study's folder, in which nothing is replaced that we did not write. Runs and trials are added beside its products."""
    return Growing(output, PRODUCTS)


def plan_table(ablation: Ablation, outlook: Outlook) -> Table:
    """What a study is going to do."""
    study, search = ablation.study, ablation.study.options.search
    table = Table("", "", title=f"study {study.name}", show_header=False)
    left = "" if not outlook.done else f", {outlook.done} of them done"
    table.add_row(
        "runs",
        f"{outlook.runs}{left}" if search is None else f"{search.trials} trials, {search.sampler}",
    )
    for factor in study.varying:
        labels = [str(a.label) for a in factor.alternatives]
        span = factor.range
        table.add_row(
            Text(f"  {factor.name}"),
            Text(f"{span.low} to {span.high}" if span else "; ".join(labels)),
        )
    if search is None:
        for name, count, where in (
            ("calibrations", outlook.calibrations, ""),
            ("bases", outlook.bases, " in a process"),  # of --workers and --ray
            ("dense evaluations", outlook.evaluations, ""),
        ):
            table.add_row(name, f"{count}, each made once{where}" if count else "none")
    table.add_row("expected", f"about {duration(outlook.seconds)} and {size(outlook.disk)} of disk")
    return table


def duration(seconds: float) -> str:
    """Seconds in words; an estimate needs no more."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
