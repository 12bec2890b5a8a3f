"""What a benchmark shows: tables for terminal and page, and bars with their quartiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import pages, plots
from .grid import Grid
from .pages import Section
from .units import Show, capital, count, ratio, size

if TYPE_CHECKING:
    from .figures import Drawing

ROUNDED = " *"  # behind the name of a model whose file holds few bits
LONGEST = 32  # letters of a name beside a bar
PHASES = {"first_token": "time to the first token", "decode": "tokens per second after it"}
MEASURED = {
    "first_token": ("seconds", "seconds", 3),
    "decode": ("tokens_per_second", "tokens per second", 1),
}
COSTS: dict[str, tuple[str, Show]] = {
    "parameters": ("parameters", count),
    "flops_per_token": ("FLOPs per token", count),
    "kv_bytes_per_token": ("KV cache per token", size),
    "file_bytes": ("weight files", size),
    "peak_memory_bytes": ("peak memory", size),
}


def grids(found: Mapping[str, Any]) -> list[Grid]:
    """Costs, and both phases under every workload."""
    return [_costs(found), *(_phase(found, phase) for phase in PHASES)]


def _costs(found: Mapping[str, Any]) -> Grid:
    first = found["models"][0]
    rows = []
    for each in found["models"]:
        cells = [each["name"] + ROUNDED * each["rounded"]]
        for key, (_, show) in COSTS.items():
            part = "" if each is first else f" ({ratio(first[key], each[key])})"
            cells.append(show(each[key], first[key]) + part)
        rows.append(cells)
    caption = f"Costs, in {found['dtype']}."
    if any(each["rounded"] for each in found["models"]):
        caption += f"{ROUNDED} Stored in few bits; run, timed and measured as full numbers."
    return Grid(caption, ["model", *(name for name, _ in COSTS.values())], rows)


def _phase(found: Mapping[str, Any], phase: str) -> Grid:
    key, unit, digits = MEASURED[phase]
    rows = []
    for each in found["timings"]:
        part = each[phase]
        cells = [
            each["name"],
            f"{each['batch']} × {each['prompt']}",
            _spread(part[key], "", digits),
        ]
        cells += [_spread(part["speed_up"], "×"), f"{part['promised_speed_up']:.2f}×"]
        rows.append([*cells, part["bound"], f"{100 * part['of_roof']:.0f} %"])
    columns = ["model", "batch × prompt", unit, "speed-up", "promised", "bound by", "of the roof"]
    machine = found["machine"]
    caption = (
        f"{capital(PHASES[phase])}: medians of {found['rounds']} rounds in turn, with quartiles. The roof: "
        f"{machine['bytes_per_second'] / 1e9:.1f} GB/s and {machine['flops_per_second'] / 1e9:,.0f} GFLOP/s, measured on "
        f"{machine['name']}, {machine['threads']} threads; below {machine['ridge']:.0f} FLOPs per byte, memory is the limit."
    )
    return Grid(caption, columns, rows)


def _spread(found: Mapping[str, float], unit: str, digits: int = 2) -> str:
    low, high = (f"{found[key]:,.{digits}f}" for key in ("low", "high"))
    return f"{found['median']:,.{digits}f}{unit} ({low} – {high})"


def figures(found: Mapping[str, Any]) -> list[Drawing]:
    """Both phases under every workload as bars."""
    drawn = []
    for phase, said in PHASES.items():
        key, unit, _ = MEASURED[phase]
        bars = {_setting(each): each[phase][key] for each in found["timings"]}
        drawn.append(plots.bars(phase.replace("_", "-"), capital(said), unit, bars))
    return drawn


def _setting(each: Mapping[str, Any]) -> str:
    name = each["name"] if len(each["name"]) <= LONGEST else f"…{each['name'][1 - LONGEST :]}"
    return f"{name}, batch {each['batch']}, prompt {each['prompt']}"


def page(found: Mapping[str, Any], drawn: list[Drawing] | None = None) -> str:
    """One HTML file that loads nothing; ``drawn`` are its figures, where they are there already."""
    names = [each["name"] for each in found["models"]]
    costs, *phases = grids(found)
    parts = zip(PHASES.values(), phases, figures(found) if drawn is None else drawn, strict=True)
    return pages.page(
        "bench",
        title=f"{names[0]} · benchmark",
        kicker="Benchmark · invariance",
        heading=" · ".join(names),
        lead=[],
        sections=[
            Section("Costs", grids=[costs]),
            *(Section(capital(said), grids=[grid], drawings=[d]) for said, grid, d in parts),
        ],
    )
