"""The results of a study: one tidy row a run, the Pareto front, files for programs and a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
from rich.table import Table
from rich.text import Text

from ..core.files import replacing
from ..recipe.recipe import Recipe
from ..report import words

Row = dict[str, Any]
DONE, FAILED, PRUNED, WAITING = "done", "failed", "pruned", "not run"
COSTS = ("parameters", "flops", "kv_bytes")
PARTS = ("embedding", "blocks", "shortcuts", "head")
QUANTIZED = ("dense_quantized", "quantized")
SHOWN = (
    "parameters",
    "flops",
    "kv_bytes",
    "perplexity",
    "ratio",
    "predicted_loss",
    "measured_loss",
    "seconds",
)


# what columns are called, up to the first dot, of which only some hold numbers
WORDS = ("run", "status", "reason", "model", "stock", "version")
NUMBERS = (
    *COSTS,
    *(f"{c}_dense" for c in COSTS),
    *(f"parameters_{p}" for p in PARTS),
    "perplexity",
    "ratio",
    "bytes",
    "calibration_tokens",
    "predicted_loss",
    "measured_loss",
    "seconds_per_token",
    "exactness",
    "seconds",
)


def row(
    key: str,
    varied: Mapping[str, Any],
    report: Mapping[str, Any] | None,
    status: str,
    reason: str = "",
) -> Row:
    """The row of a run; what is not known is None."""
    found: Row = {"run": key, **varied, "status": status, "reason": reason or None}
    if report is None:
        return found
    found = {"model": report["model"]["name"], "stock": report["model"]["stock"]} | found
    text = (report.get("recipe") or {}).get("calibrate") or {}
    known = text.get("sequences") and text.get("tokens")
    found["calibration_tokens"] = text["sequences"] * text["tokens"] if known else None
    for name, section in zip(
        COSTS, ("parameters", "flops_per_token", "kv_bytes_per_token"), strict=True
    ):
        for side in ("sliced", "dense"):
            value = report[section][side]
            found[name + ("" if side == "sliced" else "_dense")] = (
                value["total"] if name == "parameters" else value
            )
    for part in PARTS:
        found[f"parameters_{part}"] = report["parameters"]["sliced"][part]
    for n, (name, values) in enumerate(report["perplexity"].items()):
        best = values["sliced"] if values.get("recovered") is None else values["recovered"]
        if not n:
            found |= {
                "perplexity": best,
                "ratio": best / values["dense"] if best and values["dense"] else None,
            }
        found |= {
            f"perplexity.{name}.{side}": values.get(side)
            for side in ("dense", "sliced", "recovered")
        }
        found |= {f"perplexity.{name}.{side}": values[side] for side in QUANTIZED if side in values}
    if quantize := report.get("quantize"):
        found |= {f"bytes.{side}": value for side, value in quantize["bytes"].items()}
    found |= {
        f"{kind}_loss": report["predicted"][source]
        for kind, source in (("predicted", "loss"), ("measured", "measured"))
    }
    rate = report["tokens_per_second"]["sliced"]
    found |= {
        "seconds_per_token": 1 / rate if rate else None,
        "exactness": report["exactness"]["relative_error"],
    }
    found["seconds"] = round(sum(report["seconds"].values()), 3)
    found |= {f"seconds.{step}": value for step, value in report["seconds"].items()}
    return found | {f"version.{name}": value for name, value in report["versions"].items()}


def measured(recipes: Iterable[Recipe]) -> set[str]:
    """The columns of numbers that runs of these recipes may have, but for the seconds of steps."""
    found = {*NUMBERS} - {"perplexity", "ratio", "bytes"}
    for recipe in recipes:
        below = QUANTIZED if recipe.quantize else ()
        sides = ("dense", "sliced", *(("recovered",) if recipe.recover else ()), *below)
        names = [e.perplexity.label for e in recipe.evaluate if e.perplexity]
        found |= {"perplexity", "ratio"} if names else set()
        found |= {f"perplexity.{name}.{side}" for name in names for side in sides}
        found |= {f"bytes.{side}" for side in sides if below}
    return found


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def front(rows: Sequence[Row], by: tuple[str, str]) -> set[str]:
    """The runs that no other beats: none is at most as large in both columns, and smaller in one."""
    known = [
        (r[by[0]], r[by[1]], r["run"])
        for r in rows
        if r.get(by[0]) is not None and r.get(by[1]) is not None
    ]
    return {
        run
        for x, y, run in known
        if not any(a <= x and b <= y and (a < x or b < y) for a, b, _ in known)
    }


def cost_axes(rows: Sequence[Row]) -> list[str]:
    """The costs that tell the runs apart; parameters where none does."""
    names = (*COSTS, "seconds_per_token")
    return [c for c in names if len({r[c] for r in rows if r.get(c) is not None}) > 1] or [COSTS[0]]


def columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for found in rows for name in found))


def arrow(rows: Sequence[Row]) -> pyarrow.Table:
    """The rows as one table; a column whose values are of several kinds becomes words."""
    found = {}
    for name in columns(rows):
        values = [r.get(name) for r in rows]
        kinds = {type(v) for v in values if v is not None}
        mixed = len(kinds) > 1 and kinds != {int, float}
        found[name] = [None if v is None else str(v) for v in values] if mixed else values
        if kinds == {int, float}:
            found[name] = [None if v is None else float(v) for v in values]
    return pyarrow.table(found)


def write(folder: Path, rows: Sequence[Row]) -> None:
    """results.parquet and results.csv, each under a temporary name first."""
    table = arrow(rows)
    with replacing(folder / "results.parquet") as path:
        pyarrow.parquet.write_table(table, path)
    with replacing(folder / "results.csv") as path:
        pyarrow.csv.write_csv(table, path)


def cell(name: str, value: Any) -> str:
    """A value as the tables show it."""
    if value is None:
        return words.NONE
    if not is_number(value):
        return str(value)
    if name in ("parameters", "flops"):
        return words.count(value)
    if name == "kv_bytes":
        return words.size(value)
    if name == "seconds_per_token":
        return f"{1000 * value:.3g} ms"
    return words.plain(value) if isinstance(value, float) else f"{value:,}"


def shown(rows: Sequence[Row]) -> list[str]:
    """The columns that are worth a reader's time: those that some run has, and not all the same cost."""
    known = [
        name for name in (*SHOWN, "seconds_per_token") if any(r.get(name) is not None for r in rows)
    ]
    return [n for n in known if n not in COSTS[1:] or len({r.get(n) for r in rows}) > 1]


def terminal(name: str, factors: Mapping[str, str], rows: Sequence[Row]) -> Table:
    """One line a run by falling cost, those on the Pareto front marked; ``factors`` have their titles."""
    axis = cost_axes(rows)[0]
    best = front(rows, (axis, "perplexity"))
    title = f"{name}: ● no other run has less {axis} and less perplexity"
    table = Table("", *factors.values(), *(n.replace("_", " ") for n in shown(rows)), title=title)
    for n, column in enumerate(table.columns):
        column.justify, column.overflow = (
            ("left", "fold") if n <= len(factors) else ("right", "ellipsis")
        )
    for r in sorted(
        rows, key=lambda r: (r["status"] != DONE, -(r.get(axis) or 0), r.get("perplexity") or 0)
    ):
        mark = "●" if r["run"] in best else "" if r["status"] == DONE else "✗"
        cells = [Text(str(r.get(f))) for f in factors] + [
            Text(cell(n, r.get(n))) for n in shown(rows)
        ]
        style = "bold green" if r["run"] in best else "" if r["status"] == DONE else "dim"
        table.add_row(mark, *cells, style=style)
    return table
