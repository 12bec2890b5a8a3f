"""One run of a study: what names it, what it is asked in a process that may be another, and what comes back."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from ..compress import calibration
from ..compress.execution import Execution
from ..compress.planner import plan
from ..core.cache import cache_dir
from ..core.errors import InvarianceError
from ..core.progress import Progress, quiet
from ..io.data import Tokens
from ..io.memo import Memo
from ..io.models import load_config, load_model, load_tokenizer
from ..measure.evaluate import Perplexity, perplexity
from ..measure.trust import trusting
from ..method.interfaces import begin
from ..recipe.recipe import Recipe
from ..run.document import Data, speed, stored_dtype
from ..run.outcome import Loaded, outcome
from ..run.reading import read_data
from . import identity

EARLY = 4  # a run that may be stopped early is measured on one in so many windows first
PRUNED = "stopped early"


@dataclass(frozen=True)
class Request:
    """Work for one process, as plain data: recipes in full. One of them is run; several are prepared together."""

    name: str
    recipes: tuple[Mapping[str, Any], ...]
    prepares: bool = False


@dataclass(frozen=True)
class Answer:
    """What a request gave: report and spectra, or the reason of its failure."""

    request: Request
    report: dict[str, Any] | None = None
    spectra: dict[str, list[float]] = field(default_factory=dict)
    reason: str | None = None
    details: str = ""


class Pruned(Exception):
    """A run that is stopped because others were better at this point."""


def key(recipe: Recipe, execution: Execution) -> str:
    """What a run hangs on, hashed: its recipe, the local files that it names, methods that do not ship, our version, the
    kind of device."""
    hangs_on = [
        recipe.to_dict(),
        identity.files(recipe),
        identity.sources(recipe),
        [platform.python_version(), version("invariance")],
        execution.speed,
        execution.device,
    ]
    return hashlib.sha256(json.dumps(hangs_on, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Bench:
    """A model in memory with what its runs have in common. A process holds one at a time."""

    name: str
    execution: Execution
    progress: Progress

    def __post_init__(self) -> None:
        trust = self.execution.trust_remote_code
        self.config = load_config(self.name, trust_remote_code=trust)
        self.tokenizer = load_tokenizer(self.name, trust_remote_code=trust)
        self.model = load_model(self.name, device=self.execution.device, trust_remote_code=trust)
        self.memo = Memo(cache_dir("losses"))

    def data(self, recipe: Recipe) -> Data:
        """The tokens that a recipe names, read once."""
        full = recipe.to_dict()
        training = recipe.recover.text(recipe.calibrate).model_dump() if recipe.recover else None
        spec = json.dumps([full.get("calibrate"), full["evaluate"], training, recipe.seed])
        return self.memo.once(
            ("data", spec),
            lambda: read_data(
                recipe,
                self.config,
                self.tokenizer,
                model=lambda: self.model,
                progress=self.progress,
            ),
        )

    def prepare(self, recipes: Sequence[Recipe]) -> None:
        """What the runs of several recipes share: one walk over the calibration tokens, and the dense losses."""
        plans = [plan(recipe, self.config, device=self.execution.device) for recipe in recipes]
        reading = [p for p in plans if p.reads_tokens]
        if reading:
            tokens = self.data(reading[0].recipe).calibration
            assert tokens is not None
            if self.execution.processes > 1:
                from ..compress.distributed import calibrate

                calibrate(reading, tokens, self.execution)
            calibration.calibrate(
                self.model,
                reading,
                tokens,
                store=cache_dir("moments"),
                memo=self.memo,
                progress=self.progress,
            )
        for evaluation in _perplexities(*map(self.data, recipes)):
            evaluation.losses(self.model, "dense", self.progress, self.memo)

    def run(
        self, recipe: Recipe, judge: Callable[[float], bool] | None
    ) -> tuple[dict[str, Any], dict[str, list[float]]]:
        """Report and spectra of one run. Raises Pruned where ``judge`` stops it at its early perplexity."""
        data = self.data(recipe)
        measured = _perplexities(data)

        def early(model: Any) -> None:
            tokens, batch = measured[0].tokens, measured[0].part.batch
            n = max(len(tokens.ids) // EARLY, 1)
            some = Tokens(tokens.ids[:n], tokens.mask[:n])
            value = perplexity(model, some, batch, self.progress, "early perplexity")
            if judge is not None and judge(value):
                raise Pruned(f"{PRUNED}: perplexity {value:.2f} on the first {n} windows")

        made = outcome(
            Loaded(self.model, self.tokenizer, stored_dtype(self.config), self.memo),
            recipe,
            data=data,
            progress=self.progress,
            extras=False,
            early=early if judge and measured else None,
        )
        if made.logs is not None:
            shutil.rmtree(made.logs.parent, ignore_errors=True)  # what was kept to resume from
        if self.execution.speed:
            made.report["tokens_per_second"] = speed(self.model, made.model)
        return made.report, made.spectra


def _perplexities(*found: Data) -> list[Perplexity]:
    return [e for data in found for e in data.evaluations if isinstance(e, Perplexity)]


_BENCHES: list[Bench] = []  # at most one


def carry_out(
    request: Request,
    execution: Execution,
    progress: Progress = quiet,
    judge: Callable[[float], bool] | None = None,
) -> Answer:
    """Do what is asked in this process; whatever goes wrong is told in the answer."""
    try:
        with _threads(execution.threads), trusting(execution.trust_task_code):
            recipes = [Recipe.from_dict(found) for found in request.recipes]
            bench = _bench(recipes[0].model, execution, progress)
            if request.prepares:
                bench.prepare(recipes)
                return Answer(request)
            report, spectra = bench.run(recipes[0], judge)
            return Answer(request, report, spectra)
    except Pruned as e:
        return Answer(request, reason=str(e))
    except Exception as e:  # a run that fails leaves the others alone
        kind = "" if isinstance(e, InvarianceError) else f"{type(e).__name__}: "
        reason = kind + (" ".join(str(e).split()) or "no message")
        return Answer(request, reason=reason[:500], details=traceback.format_exc())


def carry_out_alone(request: Request, execution: Execution) -> Answer:
    """The same in a process of its own, whose methods are not registered yet."""
    begin(execution.plugins)
    return carry_out(request, execution)


def _bench(model: str, execution: Execution, progress: Progress) -> Bench:
    if not (_BENCHES and (_BENCHES[0].name, _BENCHES[0].execution) == (model, execution)):
        _BENCHES.clear()  # first, so that two models never lie in memory
        _BENCHES.append(Bench(model, execution, progress))
    _BENCHES[0].progress = progress
    return _BENCHES[0]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch's threads within a block."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)
