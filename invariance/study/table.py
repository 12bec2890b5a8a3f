"""The results of a study: one tidy row a run, the Pareto front, files for programs and a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
from rich.table import Table

from ..core.files import replacing
from ..recipe.recipe import Recipe
from ..report import units
from ..report.document import Mean, Pair, Report
from ..report.grid import Grid

Row = dict[str, Any]
DONE, FAILED, PRUNED, WAITING = "done", "failed", "pruned", "not run"
COSTS = ("parameters", "flops", "kv_bytes")
PARTS = ("embedding", "blocks", "shortcuts", "head")
QUANTIZED = ("dense_quantized", "quantized")
GROUPS = ("all", "calibrated", "unseen")  # of the texts that a run measures
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
    "perplexity_error",
    "ratio",
    "worst",
    "bytes",
    "calibration_tokens",
    "predicted_loss",
    "measured_loss",
    "seconds_per_token",
    "exactness",
    "seconds",
)


def row(
    key: str, varied: Mapping[str, Any], report: Report | None, status: str, reason: str = ""
) -> Row:
    """The row of a run; what is not known is None."""
    found: Row = {"run": key, **varied, "status": status, "reason": reason or None}
    if report is None:
        return found
    found = {"model": report.model.name, "stock": report.model.stock} | found
    asked = report.recipe.get("calibrate") or {}
    known = asked.get("sequences") and asked.get("tokens")
    found["calibration_tokens"] = asked["sequences"] * asked["tokens"] if known else None
    found |= _costs(report) | _worth(report)
    if report.quantize is not None:
        found |= {f"bytes.{side}": value for side, value in report.quantize.bytes.known.items()}
    found |= {"predicted_loss": report.predicted.loss, "measured_loss": report.predicted.measured}
    rate, exact = report.tokens_per_second.sliced, report.exactness
    found["seconds_per_token"] = 1 / rate if rate else None
    found["exactness"] = None if exact is None else exact.relative_error
    found["seconds"] = round(sum(report.seconds.values()), 3)
    found |= {f"seconds.{step}": value for step, value in report.seconds.items()}
    return found | {f"version.{name}": value for name, value in report.versions.items()}


def _costs(report: Report) -> Row:
    """What the sliced model and the dense one cost, and the parameters of the sliced one by part."""
    found: Row = {}
    dense, sliced = report.parameters.dense, report.parameters.sliced
    totals = [None if side is None else side.total for side in (dense, sliced)]
    total = Pair[int | float](dense=totals[0], sliced=totals[1])
    pairs = (total, report.flops_per_token, report.kv_bytes_per_token)
    for name, pair in zip(COSTS, pairs, strict=True):
        found |= {name: pair.sliced, f"{name}_dense": pair.dense}
    return found | {f"parameters_{part}": getattr(sliced, part, None) for part in PARTS}


def _worth(report: Report) -> Row:
    """Every perplexity, and that of the first data, after recovery where there is one, with its standard error."""
    found: Row = {}
    for name, each in report.perplexity.items():
        side = "sliced" if each.recovered is None else "recovered"
        best, dense = getattr(each, side), each.dense
        error = each.extra_loss.get(side, Mean()).standard_error
        if not found:
            found = {"perplexity": best, "ratio": best / dense if best and dense else None}
            known = best is not None and error is not None
            found["perplexity_error"] = best * error if known else None
        columns = dict.fromkeys(("dense", "sliced", "recovered")) | each.known
        found |= {f"perplexity.{name}.{side}": value for side, value in columns.items()}
    return found | _over_texts(report)


def _over_texts(report: Report) -> Row:
    """The geometric mean and the worst of all texts' ratios: of all, of those that calibrated, of the others."""
    groups = {"all": report.texts.all} | {
        name: getattr(report.texts, name) or {} for name in ("calibrated", "unseen")
    }
    found: Row = {}
    for name, lost in groups.items():
        of = lost.get("recovered") or lost.get("sliced")
        if of is not None:
            found |= {f"ratio.{name}": of.geometric_mean, f"worst.{name}": of.worst}
    return found


def measured(recipes: Iterable[Recipe]) -> set[str]:
    """The columns of numbers that runs of these recipes may have, but for the seconds of steps."""
    asked = {"perplexity", "perplexity_error", "ratio"}
    found = {*NUMBERS} - asked - {"bytes", "worst"}
    for recipe in recipes:
        below = QUANTIZED if recipe.quantize else ()
        sides = ("dense", "sliced", *(("recovered",) if recipe.recover else ()), *below)
        names = [
            each.label for e in recipe.evaluate if e.perplexity for each in e.perplexity.each()
        ]
        found |= asked if names else set()
        found |= {f"{what}.{group}" for what in ("ratio", "worst") for group in GROUPS if names}
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
    names = [harmless(name) for name in table.column_names]
    columns = [column.to_pylist() for column in table.columns]
    words = [[harmless(v) if isinstance(v, str) else v for v in column] for column in columns]
    safe = [pyarrow.array(v, c.type) for v, c in zip(words, table.columns, strict=True)]
    with replacing(folder / "results.csv") as path:
        pyarrow.csv.write_csv(pyarrow.table(safe, names), path)


def harmless(text: str) -> str:
    """Words that a spreadsheet would run as a formula, behind the sign that keeps it from that."""
    if not text.startswith(tuple("=+-@\t\r\n＝＋－＠")):
        return text
    try:
        float(text)  # a number among words
    except ValueError:
        return f"'{text}"
    return text


def cell(name: str, value: Any) -> str:
    """A value as the tables show it."""
    if value is None:
        return units.NONE
    if not is_number(value):
        return str(value)
    if name in ("parameters", "flops"):
        return units.count(value)
    if name == "kv_bytes":
        return units.size(value)
    if name == "seconds_per_token":
        return f"{1000 * value:.3g} ms"
    return units.plain(value) if isinstance(value, float) else f"{value:,}"


def shown(rows: Sequence[Row]) -> list[str]:
    """The columns that are worth a reader's time: those that some run has, and not all the same cost."""
    known = [
        name for name in (*SHOWN, "seconds_per_token") if any(r.get(name) is not None for r in rows)
    ]
    return [n for n in known if n not in COSTS[1:] or len({r.get(n) for r in rows}) > 1]


def terminal(name: str, factors: Mapping[str, str], rows: Sequence[Row]) -> Table:
    """One line a run by falling cost, those on the Pareto front marked; ``factors`` have their titles."""
    axis, names = cost_axes(rows)[0], shown(rows)
    best = front(rows, (axis, "perplexity"))
    said = f"{name}: ● no other run has less {axis} and less perplexity"
    lines, styles = [], []
    for r in sorted(
        rows, key=lambda r: (r["status"] != DONE, -(r.get(axis) or 0), r.get("perplexity") or 0)
    ):
        ahead, done = r["run"] in best, r["status"] == DONE
        mark = "●" if ahead else "" if done else "✗"
        labels = [str(r.get(f)) for f in factors]
        lines.append([mark, *labels, *(cell(n, r.get(n)) for n in names)])
        styles.append("bold green" if ahead else "" if done else "dim")
    columns = ["", *factors.values(), *(n.replace("_", " ") for n in names)]
    table = Grid(said, columns, lines, 1 + len(factors)).table()
    for line, style in zip(table.rows, styles, strict=True):
        line.style = style
    return table


def latex(name: str, factors: Mapping[str, str], rows: Sequence[Row]) -> Grid:
    """The results for a paper: a line for all seeds of a setting, means with one standard error, over seeds where
    there are several, else over windows."""
    kept = [f for f in factors if f != "seed"]
    names = [n for n in shown(rows) if n != "seconds"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for r in rows:
        if r["status"] == DONE:
            groups.setdefault(tuple(str(r.get(f)) for f in kept), []).append(r)
    lines = [
        [*(labels or ("all",)), *(_with_error(n, runs) for n in names)]
        for labels, runs in groups.items()
    ]
    columns = [*([factors[f] for f in kept] or ["runs"]), *(n.replace("_", " ") for n in names)]
    said = "one standard error, over seeds where there are several, else over windows"
    return Grid(f"{name}; ± is {said}.", columns, lines, max(len(kept), 1))


def _with_error(name: str, runs: Sequence[Row]) -> str:
    values = [r[name] for r in runs if r.get(name) is not None]
    if not values:
        return units.NONE
    error = spread(runs, name)
    digits = 2 if name == "perplexity" else 3
    mean = values[0] if len(set(values)) == 1 else fmean(values)
    return cell(name, mean) + (units.within(error, digits) if error and name not in COSTS else "")


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of several values."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def spread(runs: Sequence[Row], column: str) -> float | None:
    """The standard error of a column's mean: over runs where there are several, else over the windows of one."""
    found = {r["run"]: r for r in runs if r.get(column) is not None}.values()
    over_runs = standard_error([r[column] for r in found])
    return over_runs if len(found) > 1 else next((r.get(f"{column}_error") for r in found), None)
