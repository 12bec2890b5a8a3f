"""Plans and inspections in the terminal: spaces that are alike are one row, and nothing is cut off at 80 columns."""

from __future__ import annotations

import io
import re
from typing import Any

from rich.console import Console

from invariance.report.plans import inspection, plan


def shown(parts: list[Any], width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(*parts)
    return console.file.getvalue()  # type: ignore[attr-defined]


def unit(name: str, **other: Any) -> dict[str, Any]:
    methods = {"rotate": {"mixed_energy": {"of": "normed"}}, "select": "uniform"}
    about = {"spaces": [name], "group": "orthogonal", "dim": 64, "width": 32, "slice": "truncate"}
    return {**about, **methods, **other}


DOCUMENT: dict[str, Any] = {
    "units": [unit(f"mlp.{n}") for n in range(30)] + [unit("mlp.30", width=16)],
    "parameters": {"dense": {"total": 200, "head": 0}, "sliced": {"total": 100, "head": 0}},
    "flops_per_token": {"dense": 400, "sliced": 100},
    "kv_entries_per_token": {"dense": 8, "sliced": 8},
    "predicted_seconds": {"dense": None, "sliced": None},
    "nested": {},
    "needs": {"memory_bytes": 1_500_000_000, "disk_bytes": 300_000_000},
    "stock": True,
    "why_not_stock": None,
}


def test_a_plan_of_thirty_equal_spaces_has_one_row_for_them() -> None:
    said = shown(plan(DOCUMENT))
    rows = [line for line in said.splitlines() if re.match(r"\s*mlp\.", line)]
    assert len(rows) == 2 and "mlp.0–29" in rows[0] and "mlp.30" in rows[1]
    assert "mixed_energy" in re.sub(r"\s", "", said) and "…" not in said
    assert re.search(r"total\s+200\s+100\s+0\.50×", said) and "0.25×" in said
    assert "stock checkpoint" in said and "latency" not in said
    assert re.search(r"memory of the run, GB\s+1\.5", said)


def test_a_plan_whose_widths_are_not_known_yet_says_so() -> None:
    unknown = {"dense": 8, "sliced": None}
    waits = DOCUMENT | {"units": [unit("mlp.0", width=None)], "stock": None}
    waits |= {"parameters": {"dense": {"total": 200}, "sliced": None}, "flops_per_token": unknown}
    said = shown(plan(waits))
    assert "by calibration" in " ".join(said.split()) and "stock" not in said


def test_an_inspection_folds_spaces_too() -> None:
    kinds = {"kind": "mlp", "dim": 64, "copies": 1, "group": "permutation and scale"}
    found = {
        "model": "[red]m",
        "family": "llama",
        "spaces": {f"mlp.{n}": kinds for n in range(12)} | {"x.0": kinds | {"dim": 32}},
        "parameters": {"total": 19904},
        "flops_per_token": 10,
        "number_bytes": 4,
        "kv_bytes_per_token": 256,
    }
    said = shown(inspection(found))
    assert "mlp.0–11" in said and "mlp.11 " not in said and "[red]m (llama)" in said
    assert "19,904" in said and "4 bytes a number" in said
