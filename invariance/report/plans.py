"""What a recipe would do and what a model has, for the terminal: spaces that are alike are one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .document import Row
from .grid import Grid
from .units import Show, folded, method, ranges, span, whole


def plan(document: Mapping[str, Any]) -> list[Any]:
    """The document of `invariance plan`, to read."""
    rows = []
    for unit in document["units"]:
        width = "by calibration" if unit["width"] is None else str(unit["width"])
        methods = [method(unit.get(kind)) for kind in ("rotate", "select", "slice")]
        rows.append([span(unit["spaces"]), unit["group"], width, str(unit["dim"]), *methods])
    if (rare := document.get("vocabulary")) is not None:
        rows.append(
            [f"rows of tokens from {rare['common']}", "two factors", str(rare["rank"]), *4 * [""]]
        )
    columns = ["spaces", "group", "width", "of", "rotate", "select", "slice"]
    changed = Grid("What is changed.", columns, folded(rows), len(columns))
    costs = Grid("What it costs.", ["", "dense", "sliced", "ratio"], _costs(document))
    found = [changed.table(), costs.table()]
    if document["stock"] is None:
        return found
    whole_one = "Members are extracted as stock checkpoints."
    stock = whole_one if document["nested"] else "Exports as a stock checkpoint."
    why = document["why_not_stock"]
    return [*found, f"No stock checkpoint: {why}." if why else stock]


def _costs(document: Mapping[str, Any]) -> list[list[str]]:
    dense, sliced = document["parameters"]["dense"], document["parameters"]["sliced"] or {}
    rows = [Row(part, n, sliced.get(part), whole) for part, n in dense.items()]
    for share, member in document["nested"].items():
        total = None if member is None else member["total"]
        rows.append(Row(f"total, nested {share}", dense["total"], total, whole))
    shown: dict[str, tuple[str, Show]] = {
        "flops_per_token": ("FLOPs a token", whole),
        "kv_entries_per_token": ("KV numbers a token", whole),
        "predicted_seconds": ("latency, ms", lambda v, _: "" if v is None else f"{1e3 * v:.2f}"),
    }
    for key, (name, show) in shown.items():
        pair = document[key]
        if pair["dense"] is not None:
            rows.append(Row(name, pair["dense"], pair["sliced"], show))
    needs = document["needs"]
    taken = {"memory of the run, GB": "memory_bytes", "its disk, GB": "disk_bytes"}
    return [
        *(row.cells for row in rows),
        *([name, f"{needs[key] / 1e9:.1f}", "", ""] for name, key in taken.items()),
    ]


def inspection(document: Mapping[str, Any]) -> list[Any]:
    """The document of `invariance inspect`, to read."""
    spaces = [
        [name, s["kind"], str(s["dim"]), str(s["copies"]), s["group"]]
        for name, s in document["spaces"].items()
    ]
    costs = [[f"parameters, {part}", f"{n:,}"] for part, n in document["parameters"].items()]
    costs.append(["FLOPs per token", f"{document['flops_per_token']:,}"])
    kv = f"KV bytes per token, {document['number_bytes']} bytes a number"
    costs.append([kv, f"{document['kv_bytes_per_token']:,}"])
    title = f"{document['model']} ({document['family']})"
    columns = ["space", "kind", "width", "copies", "group"]
    found = Grid(title, columns, folded(spaces), len(columns))
    return [found.table(), Grid("What it costs.", ["cost", ""], costs).table()]


def derived_spaces(document: Mapping[str, Any]) -> Any:
    """The spaces of `invariance inspect` where they are derived, to read."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for name, s in document["spaces"].items():
        stem, _, layer = name.partition("@")
        row = (stem, str(s["dim"]), str(s["copies"]), s["group"])
        alike.setdefault(row, []).extend([int(layer)] if layer.isdigit() else [])
    rows = [[stem, ranges(of) if of else "", *cells] for (stem, *cells), of in alike.items()]
    title = f"{document['model']} ({document['family']}), derived; --layout shows every axis"
    columns = ["space", "layers", "width", "copies", "group"]
    return Grid(title, columns, rows, len(columns)).table()
