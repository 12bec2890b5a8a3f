"""Searches over recipes: Optuna proposes the runs, its storage remembers them, and the study keeps their results."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..core.errors import InputError
from ..core.progress import Progress
from .ablate import Ablation, folder_of
from .factors import Alternative, Factor
from .job import PRUNED, Answer, carry_out
from .plan import Job, finished, preparations
from .runners import Runner
from .study import Variant

STORAGE = "search.db"
FIRST = 8  # trials that are drawn at random before the sampler has an opinion


def opened(ablation: Ablation, workers: int, elsewhere: bool = False) -> Any:
    """The trials that are there, of this very search. Raises InputError, before anything is written, where it cannot go on."""
    optuna = _optuna()
    asked = ablation.study.options.search
    assert asked is not None
    if asked.prune and (workers > 1 or elsewhere):
        raise InputError(
            f"{ablation.study.where}: a search that prunes runs one trial at a time, in this process. Leave out --workers "
            "and --ray, or remove `prune`."
        )
    from sqlalchemy.exc import SQLAlchemyError

    folder_of(ablation.output).begin()
    path = ablation.output / STORAGE
    try:
        found = optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name=ablation.study.name,
            load_if_exists=True,
            directions=["minimize"] * len(asked.minimize),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
        )
        _same(ablation, found)
        _restore(ablation, found, optuna.trial.TrialState)
    except SQLAlchemyError as e:
        said = " ".join(str(e).split())[:150]
        raise InputError(
            f"{path}: the trials of the search cannot be read ({said}). Move the file away: the search begins anew, and runs "
            "that are there already are not repeated."
        ) from None
    return found


def search(
    ablation: Ablation, found: Any, runner: Runner, workers: int, progress: Progress
) -> None:
    """Carry out trials until there are as many as the study asks for; those that were ``opened`` count.

    The sampler's seed follows from how many trials there were, so a search that was interrupted goes on as if it had not been.
    """
    optuna = _optuna()
    asked = ablation.study.options.search
    assert asked is not None
    states = optuna.trial.TrialState
    for trial in found.get_trials(
        deepcopy=False, states=(states.RUNNING,)
    ):  # of a process that was killed
        found.enqueue_trial(trial.params)
        found.tell(trial.number, state=states.FAIL)
    prepared: set[str] = set()
    while (left := asked.trials - len(_over(found, states))) > 0:
        trials = []
        for n in range(min(workers, left)):
            number = (
                len(_over(found, states)) + n
            )  # not the trial's own, which those given back have raised
            found.sampler = _sampler(optuna, asked, number)
            trials.append(found.ask())
        jobs = [_job(ablation, trial) for trial in trials]
        missing = {job.key for job in ablation.missing}
        if new := [
            j for j in jobs if j is not None and j.key in missing and j.calibration not in prepared
        ]:
            list(runner(preparations(new)))
            prepared |= {job.calibration for job in new}
        _measure(ablation, list(zip(trials, jobs, strict=True)), runner, found, states, progress)


def _same(ablation: Ablation, found: Any) -> None:
    """Raises InputError where the trials that are there are of another search, whose values mean something else."""
    asked = ablation.study.options.search
    assert asked is not None
    content = [ablation.study.base.plain(), asked.over, asked.minimize]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    if found.trials and found.user_attrs.get("content") != digest:
        raise InputError(
            f"{ablation.study.where}: the trials in {ablation.output} are of another search: its base, `over` or `minimize` "
            "has changed since. Name another --output; `trials`, `sampler` and `seed` may change."
        )
    found.set_user_attr("content", digest)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise InputError(
            "a search needs the package optuna. Run `pip install 'invariance[search]'`."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _sampler(optuna: Any, asked: Any, number: int) -> Any:
    if asked.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(
            seed=asked.seed + number, population_size=max(min(asked.trials // 4, 50), 4)
        )
    return optuna.samplers.TPESampler(seed=asked.seed + number, n_startup_trials=FIRST)


def _over(found: Any, states: Any) -> list[Any]:
    """Trials that are over, one way or another; those of a killed process were given back."""
    over = [t for t in found.get_trials(deepcopy=False) if t.state.is_finished()]
    return [t for t in over if t.state is not states.FAIL or "reason" in t.user_attrs]


def _restore(ablation: Ablation, found: Any, states: Any) -> None:
    """The runs of earlier trials, as rows of the results. Raises InputError where they would not be the same runs now."""
    for trial in _over(found, states):
        chosen = _chosen(ablation.study.searched, trial.params)
        if "run" not in trial.user_attrs:
            ablation.refuse(chosen, trial.user_attrs["reason"])
            continue
        variant = ablation.study.variant(chosen)
        job = ablation.planner.job([variant])
        if job.key != trial.user_attrs["run"]:
            raise InputError(
                f"{ablation.study.where}: the trials in {ablation.output} were measured otherwise: `speed`, a local file "
                "that recipes name, a method that does not ship, or a package's version has changed since. Name another "
                "--output, or undo the change; what is there stays as it is."
            )
        _add(ablation, job, variant)
        reason = trial.user_attrs.get("reason")
        if reason and not finished(ablation.runs, [job]):
            ablation.failures[job.key] = reason


def _add(ablation: Ablation, job: Job, variant: Variant) -> None:
    if job.key not in {other.key for other in ablation.jobs}:
        ablation.variants.append(variant)
        ablation.jobs.append(job)


def _suggest(trial: Any, factor: Factor) -> None:
    if factor.range is None:
        trial.suggest_categorical(factor.name, [str(a.label) for a in factor.alternatives])
    elif factor.range.whole:
        step = int(factor.range.step or 1)
        trial.suggest_int(
            factor.name,
            int(factor.range.low),
            int(factor.range.high),
            step=step,
            log=factor.range.log,
        )
    else:
        trial.suggest_float(
            factor.name,
            factor.range.low,
            factor.range.high,
            step=factor.range.step,
            log=factor.range.log,
        )


def _chosen(factors: Sequence[Factor], params: dict[str, Any]) -> dict[str, Alternative]:
    return {
        f.name: f.at(params[f.name])
        if f.range
        else next(a for a in f.alternatives if str(a.label) == params[f.name])
        for f in factors
    }


def _job(ablation: Ablation, trial: Any) -> Job | None:
    """The run of a trial, or None where its recipe cannot be; the study learns of it either way."""
    for factor in ablation.study.searched:
        _suggest(trial, factor)
    chosen = _chosen(ablation.study.searched, trial.params)
    try:
        variant = ablation.study.variant(chosen)
        job = ablation.planner.job([variant])
    except (
        InputError
    ) as e:  # not all that a search proposes can be run: a budget that no widths meet
        trial.set_user_attr("reason", str(e))
        ablation.refuse(chosen, str(e))
        ablation.tell(f"trial {trial.number}: {e}")
        return None
    trial.set_user_attr("run", job.key)
    _add(ablation, job, variant)
    return job


def _measure(
    ablation: Ablation,
    pairs: list[tuple[Any, Job | None]],
    runner: Runner,
    found: Any,
    states: Any,
    progress: Progress,
) -> None:
    missing = {job.key for job in ablation.missing}
    wanted = {job.key: job for _, job in pairs if job is not None and job.key in missing}
    asked = ablation.study.options.search
    assert asked is not None
    if asked.prune:
        (trial, _), *_ = pairs
        answers: Iterable[Answer] = [
            carry_out(job.request, ablation.execution, progress, _judge(trial))
            for job in wanted.values()
        ]
    else:
        answers = runner([job.request for job in wanted.values()])
    for answer in answers:  # each kept as soon as it is there
        ablation.keep(wanted[answer.request.name], answer, f"trial {pairs[0][0].number}")
    for trial, job in pairs:
        first = not found.get_trials(deepcopy=False, states=(states.COMPLETE,))
        values = None if job is None else _values(ablation, job, asked.minimize, first)
        if values is None:
            reason = (
                trial.user_attrs.get("reason")
                or (job and ablation.failures.get(job.key))
                or "not all finite"
            )
            trial.set_user_attr("reason", reason)
            pruned = reason.startswith(PRUNED)
            found.tell(trial, state=states.PRUNED if pruned else states.FAIL)
        else:
            found.tell(trial, values)


def _judge(trial: Any) -> Callable[[float], bool]:
    def judge(value: float) -> bool:
        trial.report(value, 1)
        return bool(trial.should_prune())

    return judge


def _values(ablation: Ablation, job: Job, names: Sequence[str], first: bool) -> list[float] | None:
    """What the search minimizes, of a run that is done, if it is finite. Raises InputError where the first run lacks it."""
    found = next(r for r in ablation.rows() if r["run"] == job.key)
    if found["status"] != "done":
        return None
    values = [found.get(n) for n in names]
    lacking = [
        n for n in names if found.get(n) is None and n.split(".")[0] not in ("perplexity", "ratio")
    ]
    if first and lacking:
        raise InputError(
            f"{ablation.study.where}: search.minimize: the first run has no '{lacking[0]}', so there is nothing to learn "
            "from. Name another column, and another --output; results.csv has the columns that there are."
        )
    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    return known if len(known) == len(names) else None
