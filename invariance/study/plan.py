"""A study before it runs: every recipe planned, what the runs share, what they should take. Reads no weights."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ..compress.execution import Execution
from ..compress.heldout import HELD_OUT
from ..compress.plan import MEASURED, Plan
from ..compress.planner import plan
from ..core.errors import InputError
from ..core.group import Group
from ..core.progress import Progress, quiet
from ..io.data import DEFAULT_SEQUENCES, DEFAULT_TOKENS
from ..io.models import load_config
from ..recipe.evaluate import Perplexity
from .factors import Alternative
from .job import Request, key
from .kept import is_done
from .study import Study, Variant

REPORT_BYTES = 300_000  # of one run's report and spectra
PASSES = {
    "oneshot": 0.0,
    "sequential": 1.5,
    "dense_target": 2.5,
}  # forward passes that a run makes of its own


TRIES = (
    63  # how many combinations of a search are tried beside the first before none is held possible
)


@dataclass(frozen=True)
class Job:
    """One run of a study; variants whose recipes are the same are one."""

    key: str
    variants: tuple[Variant, ...]
    plan: Plan

    @property
    def recipe(self) -> Any:
        return self.plan.recipe

    @property
    def request(self) -> Request:
        return Request(self.key, (self.recipe.to_dict(),))

    @property
    def calibration(self) -> str:
        return f"{self.recipe.model} {self.plan.calibration if self.plan.reads_tokens else ''}"


@dataclass(frozen=True)
class Outlook:
    """What a study is going to do, and what it should take on this machine."""

    runs: int
    done: int
    calibrations: int
    bases: int
    evaluations: int
    seconds: float
    disk: int

    def to_dict(self) -> dict[str, Any]:
        return vars(self).copy()


class Planner:
    """Plans variants, each model's config read once."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.configs: dict[str, PretrainedConfig | InputError] = {}

    def job(self, variants: Sequence[Variant]) -> Job:
        """The run of variants of one recipe. Raises InputError, with the varied values, where no run can be."""
        first = variants[0]
        try:
            config = self._config(first.recipe.model)
            made = plan(first.recipe, config, device=self.execution.device)
            return Job(key(first.recipe, self.execution), tuple(variants), made)
        except InputError as e:
            raise InputError(f"{e} (in the run with {told(first.varied)})") from None

    def _config(self, model: str) -> PretrainedConfig:
        if model not in self.configs:
            try:
                self.configs[model] = load_config(
                    model, trust_remote_code=self.execution.trust_remote_code
                )
            except InputError as e:
                self.configs[model] = e
        found = self.configs[model]
        if isinstance(found, InputError):
            raise found
        return found

    def jobs(self, variants: Iterable[Variant], progress: Progress = quiet) -> list[Job]:
        """One a recipe, those that share a calibration together."""
        found: dict[str, list[Variant]] = {}
        for variant in variants:
            found.setdefault(key(variant.recipe, self.execution), []).append(variant)
        jobs = [self.job(same) for same in progress(found.values(), "plan", len(found))]
        order = list(dict.fromkeys(job.calibration for job in jobs))
        return sorted(jobs, key=lambda job: order.index(job.calibration))


def samples(planner: Planner, study: Study) -> list[Job]:
    """Runs that a search may propose, its ranges at their ends: any, and one with each of the alternatives.

    Raises InputError where none of several can be, all told or with one of the alternatives; what goes with some
    of the others only is left to the search.
    """
    every = [f.samples for f in study.searched]
    narrowed = [
        [*every[:n], (a,), *every[n + 1 :]]
        for n, f in enumerate(study.searched)
        for a in f.alternatives
    ]
    return [_possible(planner, study, choices) for choices in (every, *narrowed)]


def _possible(planner: Planner, study: Study, choices: Sequence[Sequence[Alternative]]) -> Job:
    """A run of one of each; the first of each, if it can be."""
    draw, problems = random.Random(0), list[InputError]()
    tries = [tuple(draw.randrange(len(c)) for c in choices) for _ in range(TRIES)]
    for numbers in dict.fromkeys([(0,) * len(choices), *tries]):
        chosen = {f.name: c[n] for f, c, n in zip(study.searched, choices, numbers, strict=True)}
        try:
            return planner.job([study.variant(chosen)])
        except InputError as e:
            problems.append(e)
    raise problems[0]


def told(varied: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {label}" for name, label in varied.items()) or "nothing varied"


def preparations(jobs: Sequence[Job]) -> list[Request]:
    """What must be computed once for several runs, before them."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.calibration, []).append(job)
    return [
        Request(f"calibration {n}", tuple(job.recipe.to_dict() for job in group), prepares=True)
        for n, group in enumerate(groups.values(), 1)
    ]


def outlook(jobs: Sequence[Job], done: Mapping[str, Mapping[str, Any]], times: int = 1) -> Outlook:
    """Counted from the plans; seconds from the runs that are done, or else from how fast this machine multiplies.

    Runs ``times`` as many as the jobs, of which those beyond them share all that can be shared.
    """
    left = [job for job in jobs if job.key not in done]
    walks = {job.calibration: job for job in left if job.plan.reads_tokens}
    dense = {(job.recipe.model, repr(e)): (job, e) for job in left for e in _perplexities(job)}
    bases = {
        (job.calibration, u.members, repr(u.rotate)): u
        for job in left
        for u in job.plan.units
        if job.recipe.order == "oneshot"
    }
    rate = _flops_per_second() if left else 1.0
    shared = sum(1.3 * _forward(job, job.recipe.calibrate) for job in walks.values())
    shared += sum(_forward(job, e) for job, e in dense.values())
    shared += sum(
        30.0 * u.fitted.copies * u.space.dim**3
        for u in bases.values()
        if u.rotate.produces is not Group.PERMUTATION
    )
    each = [sum(done[job.key]["seconds"].values()) for job in jobs if job.key in done]
    own = sum(each) / len(each) * len(left) if each else sum(map(_own, left)) / rate
    kept = {
        (job.calibration, m, s): u
        for job in left
        for u in job.plan.units
        for m in u.members
        for s in u.needs & MEASURED
    }
    moments = sum(8 * u.space.copies * u.space.seen**2 for u in kept.values())
    return Outlook(
        times * len(jobs),
        len(jobs) - len(left),
        len(walks),
        len(bases),
        len(dense),
        shared / rate + times * own,
        moments + times * REPORT_BYTES * len(left),
    )


def _forward(job: Job, part: Any) -> float:
    """FLOPs of a dense forward pass over the tokens that a part of a recipe names; defaults where it does not say."""
    if part is None:
        return 0.0
    return (
        float(job.plan.dense.flops({}))
        * (part.sequences or DEFAULT_SEQUENCES)
        * (part.tokens or DEFAULT_TOKENS)
    )


def _perplexities(job: Job) -> list[Perplexity]:
    """All texts whose perplexity a run measures."""
    return [each for e in job.recipe.evaluate if e.perplexity for each in e.perplexity.each()]


def _own(job: Job) -> float:
    """FLOPs, or their worth in time, of what a run computes for itself alone."""
    walk = PASSES[job.recipe.order] * _forward(job, job.recipe.calibrate)
    measured = sum(_forward(job, e) for e in _perplexities(job))
    copies = (
        2000.0 * job.plan.dense.parameters({}).total
    )  # float64 copies, the certificate, the cut itself
    return walk + measured + copies + _searching(job) + _training(job)


def _searching(job: Job) -> float:
    """FLOPs of the held-out losses that selectors ask for, counted as they ask for made-up ones."""
    chart, choices = job.plan, set[frozenset[tuple[str, int]]]()
    if not chart.measures:
        return 0.0
    flat = {u.space.name: torch.ones(u.space.copies, u.space.dim) for u in chart.units}

    def loss(widths: Mapping[str, int]) -> float:
        choices.add(frozenset(widths.items()))
        return sum((1 - k / flat[name].shape[1]) ** 2 for name, k in widths.items())

    chart.allocate(flat, loss, influence=[1.0] * chart.blocks)
    return len(choices) * _forward(job, job.recipe.calibrate) / HELD_OUT


def _training(job: Job) -> float:
    """FLOPs of recovery: forward once and backward, which takes twice as long, over its tokens."""
    asked = job.recipe.recover
    if asked is None:
        return 0.0
    text = asked.text(job.recipe.calibrate)
    seen = (
        (asked.epochs or 1)
        * (text.sequences or DEFAULT_SEQUENCES)
        * (text.tokens or DEFAULT_TOKENS)
    )
    return 3.0 * float(job.plan.dense.flops({})) * (asked.tokens or seen)


def _flops_per_second(size: int = 768, repeats: int = 4) -> float:
    """How fast this machine multiplies float32 matrices; models reach about half of it."""
    a = torch.ones(size, size)
    a @ a
    start = time.perf_counter()
    for _ in range(repeats):
        a @ a
    return 0.5 * repeats * 2 * size**3 / max(time.perf_counter() - start, 1e-9)


def finished(folder: Path, jobs: Sequence[Job]) -> dict[str, Path]:
    """The folders of those runs that are done; those whose report is damaged are done again."""
    return {job.key: found for job in jobs if is_done(found := folder / job.key)}
