"""Numbers and names in words: counts, bytes and ratios in fit units, and many spaces as one range."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

NONE = "–"
Number = int | float | None
Show = Callable[[Number, Number], str]


def ratio(dense: Number, sliced: Number) -> str:
    if not dense or sliced is None:
        return NONE
    times = sliced / dense
    digits = ",.0f" if times >= 100 else ".2f" if times >= 0.01 else ".1e"
    return f"{times:{digits}}×"


def count(value: Number, largest: Number = None) -> str:
    """A count in the unit that suits ``largest``, so that a table's numbers stand in one unit."""
    if value is None:
        return NONE
    top = abs(value if largest is None else largest)
    for least, size, unit, digits in ((1e10, 1e9, "B", 2), (1e6, 1e6, "M", 1), (1e4, 1e3, "k", 1)):
        if top >= least and round(value / size, digits):
            return f"{value / size:,.{digits}f}{unit}"
    return f"{value:,.0f}"


def size(value: Number, largest: Number = None) -> str:
    """Bytes, in the unit that suits ``largest``."""
    if value is None:
        return NONE
    power = min(int(math.log2(max(value if largest is None else largest, 1)) // 10), 4)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{value / 1024**power:,.{1 if power else 0}f}\xa0{unit}"


def plain(value: Number, largest: Number = None) -> str:
    if value is None:
        return NONE
    return f"{value:,.2f}" if abs(value) < 1e5 else f"{value:.2e}"


def fine(value: Number, largest: Number = None) -> str:
    return NONE if value is None else f"{value:.4f}"


def whole(value: Number, largest: Number = None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def times(value: Number) -> str:
    return NONE if value is None else f"{value:.3f}×"


def rate(value: Number, largest: Number = None) -> str:
    return NONE if value is None else f"{value:,.{0 if value >= 100 else 1}f}"


def milliseconds(value: Number, largest: Number = None) -> str:
    return NONE if value is None else f"{1e3 * value:,.1f}\xa0ms"


def error(value: Number) -> str:
    if value is None or value == 0:
        return NONE if value is None else "0"
    return f"{value:.1e}" if abs(value) < 0.01 else f"{value:.2f}"


def signed(value: Number, error: Number, digits: int = 3) -> str:
    """A value with its sign and its standard error."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:+.{digits}f}{within(error, digits)}"


def within(error: Number, digits: int = 3) -> str:
    return "" if error is None else f" ± {error:.{digits}f}"


def short(value: float, _: object = None) -> str:
    """A number beside an axis."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / min(size, 1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.6g}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def method(spec: Any) -> str:
    """A method as a recipe names it, on one line: ``pca(of: raw)``."""
    if not isinstance(spec, Mapping):
        return "" if spec is None else str(spec)
    parts = []
    for name, options in spec.items():
        said = options if isinstance(options, Mapping) else {}
        inside = ", ".join(f"{key}: {value}" for key, value in said.items())
        parts.append(f"{name}({inside})" if inside else str(name))
    return ", ".join(parts)


def order(name: str) -> list[int]:
    """A space's place in depth."""
    return [int(n) for n in re.findall(r"\d+", name)] or [0]


def block(name: str) -> int:
    return order(name)[0]


def ranges(numbers: Iterable[int]) -> str:
    """``0–3, 7`` for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def span(names: Sequence[str]) -> str:
    """Spaces that are alike as one name: ``mlp.0–29`` for thirty of them, ``x.0–29.1`` for points in blocks."""
    found: dict[tuple[str, str], list[int]] = {}
    for name in names:
        head, number, tail = re.fullmatch(r"(\D*)(\d*)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
        found.setdefault((head, tail), []).append(int(number or -1))
    return ", ".join(
        head + ("" if numbers == [-1] else ranges(numbers)) + tail
        for (head, tail), numbers in found.items()
    )


def folded(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows that differ in their first cell alone, a space's name, as one row."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        alike.setdefault(tuple(cells), []).append(name)
    return [[span(names), *cells] for cells, names in alike.items()]
