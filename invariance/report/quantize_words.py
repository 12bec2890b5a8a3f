"""What a report says of quantisation: the same quantities as of the plain models, a line beneath them."""

from __future__ import annotations

from .words import NONE, Report, Row, plain, size


def at(report: Report) -> str:
    """The name of a line for the rounded models."""
    asked = report["recipe"]["quantize"]
    return f"at {asked['bits']} bits, groups of {asked['group']}"


def sizes(report: Report) -> list[Row]:
    """Bytes of the weights, plain and packed."""
    if not (found := report.get("quantize")):
        return []
    b = found["bytes"]
    return [
        Row("bytes of weights", b["dense"], b["sliced"], size),
        Row(at(report), b["dense_quantized"], b["quantized"], size, part=True),
    ]


def perplexities(report: Report) -> list[Row | None]:
    """One line for every perplexity; None where nothing was quantised."""
    return [
        Row(at(report), found["dense_quantized"], found["quantized"], plain, part=True)
        if found.get("quantized") is not None
        else None
        for found in (report.get("perplexity") or {}).values()
    ]


def outliers(report: Report) -> list[Row]:
    """How far the largest numbers stand out before and after the change of basis, and what rounding costs."""
    if not (found := report.get("quantize")):
        return []
    error = found["rounding_error"]
    rows = [Row("rounding error, ‖ΔW‖/‖W‖", error["dense_quantized"], error["quantized"], _fine)]
    names = {"weights": "weights, in groups", "stream": "stream, in tokens"}
    measures = {"peak": "max/RMS", "largest_peak": "largest max/RMS", "kurtosis": "kurtosis"}
    for key, name in names.items():
        if sides := found["outliers"][key]:
            for m, title in measures.items():
                rows.append(Row(f"{title} of {name}", sides["dense"][m], sides["sliced"][m], plain))
    return rows


def summary(report: Report) -> list[str]:
    """Bytes and perplexities, rounded, in a sentence."""
    if not sizes(report):
        return []
    _, dense, small, _ = sizes(report)[1].cells
    said = (
        f"Rounded {at(report)}, it takes {small} where the dense model, so rounded, takes {dense}"
    )
    for name, row in zip(report.get("perplexity") or {}, perplexities(report)[:1], strict=False):
        if row is not None:
            said += f"; its perplexity on {name} is then {row.cells[2]}, the dense model's {row.cells[1]}"
    return [f"{said}."]


def checkpoint(report: Report) -> str:
    """How the checkpoint holds its weights."""
    if not (found := report.get("quantize")):
        return ""
    takes = NONE if found["file_bytes"] is None else size(found["file_bytes"])
    return (
        f" Its weights are quantised: loading needs the package torchao, which keeps every rounded weight in a whole byte, so "
        f"that the file takes {takes}. The bytes named elsewhere are those of tight packing."
    )


def _fine(value: float | None, largest: float | None = None) -> str:
    return NONE if value is None else f"{value:.4f}"
