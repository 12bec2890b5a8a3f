"""Many texts: what recipes lose on each of them, calibrated on or not, at several budgets, with the bytes stored.

    python benchmarks/texts.py recipes/best-mixture.yaml --budgets 0.9 0.8 0.7 --output texts.json
    python benchmarks/texts.py recipes/best-mixture.yaml --budgets 0.9 0.8 0.7 --set calibrate.data=self --output texts.json

A recipe without a budget, or with `--budgets` left out, is run as it is. Where it has `quantize`, the dense model is rounded
alike and has a row of its own; where it has `recover`, the model before and after has one. Rows are appended to the output as
they come, and rows that are there already are not run again; the table has all rows of the output.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from invariance.cli.terminal import device_named, progress
from invariance.core.files import write_json
from invariance.io.hub import cache_dir
from invariance.io.memo import Memo
from invariance.io.models import load_model, load_tokenizer
from invariance.recipe.recipe import load_recipe
from invariance.run.outcome import Loaded, outcome

ALL = "evaluate=[{perplexity: {data: packaged:texts}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipes", nargs="*", type=Path)
    parser.add_argument("--budgets", nargs="*", type=float, default=[])
    parser.add_argument("--evaluate", default=ALL.partition("=")[2], help="as a recipe has it")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE")
    parser.add_argument("--device", default="auto", type=device_named, help="auto, cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("texts.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(args.output.read_text()) if args.output.exists() else []
    for path in args.recipes:
        for budget in args.budgets or [None]:
            key = {"recipe": path.stem, "budget": budget, "set": args.sets}
            if any(key.items() <= row.items() for row in rows):
                continue
            rows += [key | row for row in measured(path, budget, args)]
            write_json(args.output, rows)
            print(table(rows[-1:]), flush=True)
    print(table(rows))


def measured(path: Path, budget: float | None, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one run, one for each model that it made."""
    sets = [f"evaluate={args.evaluate}", *args.sets]
    recipe = load_recipe(path, sets + ([f"budget.parameters={budget}"] if budget else []))
    model, tokenizer = load_model(recipe.model, device=args.device), load_tokenizer(recipe.model)
    memo = Memo(cache_dir("losses"), limit=0)  # the dense model's losses are computed once
    loaded = Loaded(model, tokenizer, memo=memo)
    report = outcome(loaded, recipe, progress=progress, extras=False).report
    texts, sizes = report["texts"], report["parameters"]
    share = sizes["sliced"]["total"] / sizes["dense"]["total"]
    packed = (report["quantize"] or {}).get("bytes", {})
    found = []
    for side in texts["all"]:
        row: dict[str, Any] = {"side": side, "share": share, "bytes": packed.get(side)}
        row |= {group: texts[group].get(side) for group in ("all", "calibrated", "unseen")}
        row["each"] = {name: each["ratio"][side] for name, each in texts["each"].items()}
        row["calibrated_on"] = [n for n, each in texts["each"].items() if each["calibrated"]]
        found.append(row | {"predicted": report["predicted"], "seconds": report["seconds"]})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; texts that calibrated the model in brackets."""
    names = list(dict.fromkeys(name for row in rows for name in row["each"]))
    short = [name.removeprefix("packaged:") for name in names]
    head = ["recipe", "budget", "model", "MB", "in kind", "worst of other kinds", *short]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["recipe"], str(row["budget"] or ""), row["side"]]
        cells.append("" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}")
        mean, worst = row["calibrated"] or row["all"], row["unseen"] or row["all"]
        cells += [f"{mean['geometric_mean']:.3f}", f"{worst['worst']:.3f}"]
        for name in names:
            value = f"{row['each'][name]:.3f}" if name in row["each"] else ""
            cells.append(f"({value})" if name in row["calibrated_on"] else value)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
