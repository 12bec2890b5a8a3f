"""Tasks of lm-eval: which there are, what two models score on them, and which differences are more than chance."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..core.errors import InputError, did_you_mean
from ..core.paths import expanded
from ..io.hub import hub
from ..recipe.evaluate import Tasks
from .trust import check_trusted, sandboxed

GROUPS = {
    "article": (
        "winogrande",
        "hellaswag",
        "piqa",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
        "boolq",
    ),
    "long-context": (
        "longbench_qasper",
        "longbench_multifieldqa_en",
        "longbench_hotpotqa",
        "longbench_gov_report",
        "longbench_passage_retrieval_en",
    ),
    "reasoning": ("gsm8k",),
    "code": ("humaneval",),
}
SIGNIFICANCE = 0.05  # of all differences of a run together
PLAIN = (bool, int, float, np.number, np.bool_)
ALLOWED = "HF_ALLOW_CODE_EVAL"
SEED = 1234  # of the examples in front of a question, as lm-eval has it
BOOTSTRAPS = 1000  # for standard errors that have no formula
FORMS = f"Give a task of lm-eval, such as gsm8k; one of {', '.join(GROUPS)}; or a task file that ends in .yaml."


@dataclass(frozen=True)
class Difference:
    """What one model scores above another on the same questions."""

    difference: float | None  # None where either has none
    standard_error: float | None
    p: float | None  # two-sided: exact where an answer is right or wrong, else of a paired t-test


def load(part: Tasks, where: str) -> list[Any]:
    """The tasks, each with its questions read. Raises InputError."""
    manager = _manager(part, where)
    tasks: list[Any] = []
    for name in part.names:
        for each in GROUPS.get(name, (name,)):
            tasks += _load(manager, each, where, part.run_code)
    tasks = list({t.task_name: t for t in tasks}.values())  # a group may name one again
    for task in tasks:
        shots = task.get_config("num_fewshot") if part.shots is None else part.shots
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEED)
    unsafe = [t.task_name for t in tasks if t.get_config("unsafe_code")]
    if unsafe and not part.run_code:
        raise InputError(
            f"{where}: task '{unsafe[0]}' runs programs that the model writes, and nothing confines them. "
            "Say `run_code: true` (--run-code) on a machine where that is all right, or leave the task out."
        )
    return tasks


@functools.cache
def index(shipped: bool) -> Any:
    """lm-eval's index of tasks: the thousands that ship with it, which takes seconds, or none."""
    from lm_eval.tasks import TaskManager

    with _hushed():
        return TaskManager(include_defaults=shipped)


def _manager(part: Tasks, where: str) -> Any:
    try:
        manager = index(any(not _is_file(n) for n in part.names))
    except ImportError as e:
        raise InputError(
            f"{where}: tasks need the package lm-eval ({e}). Run `pip install 'invariance[eval]'`."
        ) from None
    for name in part.names:
        if _is_file(name) and not expanded(name, where).is_file():
            raise InputError(f"{where}: task file {name}: there is no such file. {FORMS}")
        known = {*manager.all_tasks, *GROUPS}
        if not _is_file(name) and name not in known:
            near = did_you_mean(name, known)  # of thousands of names a list is no help
            raise InputError(
                f"{where}: no task is called '{name}'{near if 'did you mean' in near else f'. {FORMS}'}"
            )
    return manager


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _load(manager: Any, name: str, where: str, allowed: bool) -> list[Any]:
    path = expanded(name, where).absolute()
    folder = contextlib.chdir(path.parent) if _is_file(name) else contextlib.nullcontext()
    if _is_file(name):
        check_trusted(name, where)
    with (
        hub() as online,
        folder,
        _hushed(),
        sandboxed(),
        _programs(allowed),
    ):  # paths inside a task file are relative to it
        try:
            return list(manager.load([str(path) if _is_file(name) else name])["tasks"].values())
        except Exception as e:  # datasets, yaml and the code of a task each raise their own
            remedy = (
                "Check what its file says."
                if _is_file(name) or online
                else "The hub cannot be reached."
            )
            said = " ".join(str(e).split()).rstrip(".")[:300] or type(e).__name__
            raise InputError(f"{where}: task {name} cannot be read: {said}. {remedy}") from e


def scores(
    model: PreTrainedModel, tokenizer: Any, tasks: Sequence[Any], part: Tasks
) -> dict[str, Any]:
    """What lm-eval finds of one model: its results, with the score of every question."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    with hub(), _hushed(), sandboxed(), _programs(part.run_code):
        lm = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=part.batch,
        )
        return evaluate(
            lm,
            {"tasks": {t.task_name: t for t in tasks}, "groups": {}, "group_map": {}},
            limit=part.limit,
            bootstrap_iters=BOOTSTRAPS,
            confirm_run_unsafe_code=part.run_code,
        )


def rows(found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every metric of every task: by side its score, and what the others score above the first.

    ``found`` is what ``scores`` gives, by side. ``significant`` is decided over all rows together (Holm).
    """
    reference, *others = found
    made = []
    for task, results in found[reference]["results"].items():
        for key in results:
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            each = {
                side: _each(f["samples"].get(task, []), metric, chosen) for side, f in found.items()
            }
            whole = {side: _score(f["results"][task], metric, chosen) for side, f in found.items()}
            made.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": chosen,
                    "questions": found[reference]["n-samples"][task]["effective"],
                    "shots": found[reference]["n-shot"].get(task),
                    **whole,
                    "difference": {
                        side: vars(
                            paired(each[reference], each[side])
                            or of_all(whole[reference], whole[side])
                        )
                        for side in others
                    },
                }
            )
    mark([row["difference"][side] for row in made for side in others])
    return made


def _score(results: Mapping[str, Any], metric: str, chosen: str) -> dict[str, float | None]:
    error = results.get(f"{metric}_stderr,{chosen}")
    known = error if isinstance(error, int | float) else None
    return {"value": float(results[f"{metric},{chosen}"]), "standard_error": known}


def _each(samples: Sequence[Mapping[str, Any]], metric: str, chosen: str) -> dict[Any, float]:
    """The score of every question; none where a metric is about all of them at once."""
    found = {
        s["doc_id"]: s.get(metric)
        for s in samples
        if s.get("filter") == chosen and metric in s["metrics"]
    }
    return {n: float(v) for n, v in found.items() if isinstance(v, PLAIN)}


def of_all(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> Difference:
    """The difference of two scores that are of all questions at once, where nothing tells chance apart."""
    a, b = (np.nan if each["value"] is None else each["value"] for each in (before, after))
    return Difference(float(b - a) if np.isfinite(b - a) else None, None, None)


def paired(before: Mapping[Any, float], after: Mapping[Any, float]) -> Difference | None:
    """The mean difference on the questions that both have: sign test where all are 0 or 1, else a paired t-test. None
    where there are no such questions."""
    from scipy import stats  # a second to import

    both = sorted(before.keys() & after.keys())
    a, b = (np.array([values[n] for n in both]) for values in (before, after))
    d = b - a
    if not len(d):
        return None
    error = float(d.std(ddof=1) / len(d) ** 0.5) if len(d) > 1 else None
    moved = int((d != 0).sum())
    if not moved:
        p: float | None = 1.0
    elif np.isin(np.concatenate([a, b]), (0, 1)).all():
        p = float(stats.binomtest(int((d > 0).sum()), moved).pvalue)
    else:
        p = float(stats.ttest_rel(b, a).pvalue) if error else None
    return Difference(float(d.mean()), error, p)


def mark(differences: Sequence[dict[str, Any]]) -> None:
    """Adds ``significant`` to each: Holm's procedure, so that a run errs once in twenty at most."""
    known = sorted((d for d in differences if d["p"] is not None), key=lambda d: d["p"])
    going = True
    for n, difference in enumerate(known):
        going = going and difference["p"] * (len(known) - n) <= SIGNIFICANCE
        difference["significant"] = going
    for difference in differences:
        difference.setdefault("significant", None)


@contextlib.contextmanager
def _programs(allowed: bool) -> Iterator[None]:
    """Let metrics that run programs do so where the user said it, which they ask a variable of the environment."""
    before = os.environ.get(ALLOWED)
    if allowed:
        os.environ[ALLOWED] = "1"
    try:
        yield
    finally:
        if allowed and before is None:
            del os.environ[ALLOWED]
        elif allowed:
            os.environ[ALLOWED] = str(before)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without lm-eval's remarks; its progress bars stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
