"""What a benchmark shows: tables for terminal and page, and bars with their quartiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import Element

from . import charts
from .charts import el
from .grid import Grid
from .words import count, ratio, size

ROUNDED = " *"  # behind the name of a model whose file holds few bits
LONGEST = 32  # letters of a name above a bar
PHASES = {"first_token": "time to the first token", "decode": "tokens per second after it"}


def grids(found: Mapping[str, Any]) -> list[Grid]:
    """Costs, and both phases in every setting."""
    return [_costs(found), *(_phase(found, phase) for phase in PHASES)]


def _costs(found: Mapping[str, Any]) -> Grid:
    first = found["models"][0]
    shown = {
        "parameters": count,
        "flops_per_token": count,
        "kv_bytes_per_token": size,
        "file_bytes": size,
        "peak_memory_bytes": size,
    }
    rows = []
    for each in found["models"]:
        cells = [each["name"] + ROUNDED * each["rounded"]]
        for key, show in shown.items():
            part = "" if each is first else f" ({ratio(first[key], each[key])})"
            cells.append(show(each[key], first[key]) + part)
        rows.append(cells)
    columns = [
        "model",
        "parameters",
        "FLOPs per token",
        "KV cache per token",
        "weight files",
        "peak memory",
    ]
    caption = f"Costs, in {found['dtype']}."
    if any(each["rounded"] for each in found["models"]):
        caption += f"{ROUNDED} Stored in few bits; run, timed and measured as full numbers."
    return Grid(caption, columns, rows)


def _phase(found: Mapping[str, Any], phase: str) -> Grid:
    rows = []
    for each in found["timings"]:
        part = each[phase]
        rows.append(
            [
                each["name"],
                f"{each['batch']} × {each['prompt']}",
                _value(part, phase),
                _spread(part["speed_up"], "×"),
                f"{part['promised_speed_up']:.2f}×",
                part["bound"],
                f"{100 * part['of_roof']:.0f} %",
            ]
        )
    measured = {"first_token": "seconds", "decode": "tokens per second"}[phase]
    columns = [
        "model",
        "batch × prompt",
        measured,
        "speed-up",
        "promised",
        "bound by",
        "of the roof",
    ]
    machine = found["machine"]
    caption = (
        f"{PHASES[phase].capitalize()}: medians of {found['rounds']} rounds in turn, with quartiles. The roof: "
        f"{machine['bytes_per_second'] / 1e9:.1f} GB/s and {machine['flops_per_second'] / 1e9:,.0f} GFLOP/s, measured on "
        f"{machine['name']}, {machine['threads']} threads; below {machine['ridge']:.0f} FLOPs per byte, memory is the limit."
    )
    return Grid(caption, columns, rows)


def _value(part: Mapping[str, Any], phase: str) -> str:
    if phase == "first_token":
        return _spread(part["seconds"], "", 3)
    return _spread(part["tokens_per_second"], "", 1)


def _spread(found: Mapping[str, float], unit: str, digits: int = 2) -> str:
    return f"{found['median']:,.{digits}f}{unit} ({found['low']:,.{digits}f} – {found['high']:,.{digits}f})"


def page(found: Mapping[str, Any]) -> str:
    """One HTML file that loads nothing."""
    names = [each["name"] for each in found["models"]]
    body: list[Element] = [
        el("p", "Benchmark · invariance", class_="soft"),
        el("h1", " · ".join(names)),
        el("h2", "Costs"),
        _costs(found).element(),
    ]
    for phase, words in PHASES.items():
        said = f"{words}, medians and quartiles"
        bars = [_bar(each, phase) for each in found["timings"]]
        drawn = charts.bars_chart(
            said.capitalize(), "; ".join(f"{b.name}: {b.said}" for b in bars), bars
        )
        body += [el("h2", words.capitalize()), el("figure", drawn), _phase(found, phase).element()]
    return charts.document(f"{names[0]} · benchmark", *body)


def _bar(each: Mapping[str, Any], phase: str) -> charts.Bar:
    key = "seconds" if phase == "first_token" else "tokens_per_second"
    spread = each[phase][key]
    name = each["name"] if len(each["name"]) <= LONGEST else f"…{each['name'][1 - LONGEST :]}"
    unit, digits = ("s", 3) if phase == "first_token" else ("tokens/s", 1)
    said = f"{spread['median']:,.{digits}f} {unit}"
    return charts.Bar(f"{name}, batch {each['batch']}, prompt {each['prompt']}", said, **spread)
