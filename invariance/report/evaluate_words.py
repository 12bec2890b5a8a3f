"""What evaluations found, as tables: perplexity, divergence by position, tasks, samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from .grid import Grid
from .words import NONE, count, plain, ratio, size, whole

SIDES = {
    "model": "model",
    "dense": "dense",
    "sliced": "sliced",
    "recovered": "recovered",
    "dense_quantized": "dense, quantised",
    "quantized": "quantised",
}  # in a report, and in words


def grids(report: Mapping[str, Any]) -> list[Grid]:
    """All tables, those of what was measured."""
    return [
        *perplexity(report),
        *(g for name, found in report["divergence"].items() for g in divergence(name, found)),
        *tasks(report),
    ]


def members(report: Mapping[str, Any]) -> list[Grid]:
    """The nested members of a family side by side, where it is one."""
    found = report.get("nested") or []
    if not found:
        return []
    names = list(found[0]["perplexity"])
    total = report["parameters"]["dense"]["total"]
    rows = []
    for each in found:
        parameters, flops = each["parameters"]["total"], each["flops_per_token"]
        kept = [f"{each['share']:g}", count(parameters), ratio(total, parameters), count(flops)]
        measured = [each["perplexity"][name] for name in names]
        worth = [
            plain(m["sliced"] if m.get("recovered") is None else m["recovered"]) for m in measured
        ]
        rows.append(
            [
                *kept,
                size(each["kv_bytes_per_token"]),
                *worth,
                "no" if each["why_not_stock"] else "yes",
            ]
        )
    columns = ["share", "parameters", "of dense", "FLOPs per token", "KV cache per token"]
    columns += [*(f"perplexity, {name}" for name in names), "stock"]
    note = "Nested members: `invariance extract` with `--width` and a share makes one a checkpoint of its own."
    return [Grid(note, columns, rows)]


def signed(value: float | None, error: float | None, factor: float = 1, digits: int = 3) -> str:
    """A value with its sign and its standard error."""
    if value is None or math.isnan(value):
        return NONE
    return f"{factor * value:+.{digits}f}{_error(error, factor, digits)}"


def _error(error: float | None, factor: float = 1, digits: int = 3) -> str:
    return "" if error is None else f" ± {factor * error:.{digits}f}"


def sides_of(found: Mapping[str, Any]) -> list[str]:
    """The models that something was measured of, the reference first."""
    return [side for side in SIDES if found.get(side) is not None]


def windows(found: Mapping[str, Any]) -> str:
    """On what a perplexity was measured."""
    if "window" not in found:
        return f"{whole(found.get('tokens'))} tokens"
    overlap = "" if found["stride"] >= found["window"] else f", stride {found['stride']}"
    return f"{whole(found['tokens'])} tokens, window {found['window']}{overlap}"


def perplexity(report: Mapping[str, Any]) -> list[Grid]:
    found = report["perplexity"]
    if not found:
        return []
    sides = sides_of(next(iter(found.values())))
    compared = len(sides) > 1
    rows = []
    for name, each in found.items():
        cells = [name, windows(each), *(plain(each[side]) for side in sides)]
        for side in sides[1:]:
            extra = (each.get("extra_loss") or {}).get(side, {})
            cells += [
                ratio(each[sides[0]], each[side]),
                signed(extra.get("value"), extra.get("standard_error")),
            ]
        rows.append(cells)
    columns = [
        "data",
        "measured on",
        *(SIDES[s] for s in sides),
        *(c for s in sides[1:] for c in (f"ratio, {SIDES[s]}", "nats per token")),
    ]
    note = "; ± is one standard error over windows" if compared else ""
    return [Grid(f"Perplexity: exp of the mean next-token loss{note}.", columns, rows)]


def divergence(name: str, found: Mapping[str, Any]) -> list[Grid]:
    """By position, one table for each model that was compared."""
    made = []
    for side in sides_of(found):
        if side == found["reference"]:
            continue
        each = found[side]
        rows = [_within("all positions", each)]
        rows += [_within(f"{p['from']} to {p['to']}", p) for p in each["positions"]]
        caption = (
            f"{name}, {SIDES[side]} against {found['reference']}, window {each['window']}: KL and loss in nats per token, "
            "by how many tokens stand before the one that is predicted."
        )
        columns = ["tokens before", "tokens", "KL", "same first choice", "extra loss"]
        made.append(Grid(caption, columns, rows))
    return made


def _within(name: str, found: Mapping[str, Any]) -> list[str]:
    kl = (
        NONE
        if found["kl"] is None
        else f"{found['kl']:.4f}{_error(found['kl_standard_error'], 1, 4)}"
    )
    same = NONE if found["agreement"] is None else f"{100 * found['agreement']:.1f} %"
    extra = signed(found["extra_loss"], found["extra_loss_standard_error"], 1, 4)
    return [name, whole(found["tokens"]), kl, same, extra]


def tasks(report: Mapping[str, Any]) -> list[Grid]:
    found = report["tasks"]
    if not found:
        return []
    sides = sides_of(found[0])
    rows = []
    for each in found:
        metric = (
            each["metric"] if each["filter"] == "none" else f"{each['metric']}, {each['filter']}"
        )
        cells = [each["task"], metric, whole(each["questions"]), str(each["shots"])]
        cells += [_score(each[side]) for side in sides]
        for d in (each["difference"].get(side) for side in sides):
            if d is not None:
                p = NONE if d["p"] is None else f"{d['p']:.3g}"
                cells += [
                    signed(d["difference"], d["standard_error"]),
                    p,
                    _verdict(d["significant"]),
                ]
        rows.append(cells)
    columns = ["task", "metric", "questions", "shots", *(SIDES[s] for s in sides)]
    columns += [c for s in sides[1:] for c in (f"difference, {SIDES[s]}", "p", "significant")]
    note = (
        " Differences are of the same questions; significant at 5 % for all rows together (Holm)."
    )
    return [Grid(f"Tasks, ± one standard error.{note if len(sides) > 1 else ''}", columns, rows)]


def _score(found: Mapping[str, Any]) -> str:
    value = found["value"]
    return (
        NONE
        if value is None or math.isnan(value)
        else f"{value:.3f}{_error(found['standard_error'])}"
    )


def _verdict(significant: bool | None) -> str:
    return NONE if significant is None else "yes" if significant else "no"


def samples(report: Mapping[str, Any]) -> list[Any]:
    """Continuations side by side, for the terminal."""
    made = []
    for found in report.get("samples") or []:
        sides = sides_of(found)
        texts = Table(
            *(SIDES[s] for s in sides),
            title=Text(found["prompt"]),
            title_justify="left",
            expand=True,
        )
        for column in texts.columns:
            column.ratio = 1
        texts.add_row(*(Text(found[side] or NONE) for side in sides))
        made.append(texts)
    return made
