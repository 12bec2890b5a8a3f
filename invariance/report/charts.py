"""The HTML report's parts: elements that escape what they hold, tables, and charts as inline SVG."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from .style import STYLE
from .words import Width

POINTS = 128  # the most that are drawn of one curve
DECADES = 12  # the most that a spectrum falls before it leaves the chart
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = (
    420,
    210,
    44,
    16,
    12,
    36,
)  # a chart, in the units of its font size


def el(tag: str, *children: Element | str | None, **attributes: object) -> Element:
    """An element; ``class_`` and ``text_anchor`` become class and text-anchor, None is left out."""
    pairs = {
        k.rstrip("_").replace("_", "-"): _clean(str(v))
        for k, v in attributes.items()
        if v is not None
    }
    element = Element(tag, pairs)
    for child in children:
        if isinstance(child, str):
            if len(element):
                element[-1].tail = (element[-1].tail or "") + _clean(child)
            else:
                element.text = (element.text or "") + _clean(child)
        elif child is not None:
            element.append(child)
    return element


def _clean(text: str) -> str:
    """Without the characters that neither HTML nor a UTF-8 file can hold."""
    return re.sub("[^\t\n\r -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def document(title: str, *body: Element, script: str | None = None, style: str = "") -> str:
    """A page that may load nothing, and run nothing but the script given, as text."""
    allowed = "default-src 'none'; style-src 'unsafe-inline'"
    if script is not None:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        allowed += f"; script-src 'sha256-{digest}'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el(
            "meta",
            http_equiv="Content-Security-Policy",
            content=allowed,
        ),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", STYLE + style),
    )
    run = None if script is None else el("script", script)
    root = el("html", head, el("body", el("main", *body), run), lang="en")
    return (
        "<!doctype html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"
    )


def table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[Element | str]], class_: str = ""
) -> Element:
    """A table whose first column names its rows."""
    head = el("tr", *(el("th", name, scope="col") for name in columns))
    body = [
        el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:]))
        for row in rows
    ]
    whole = el(
        "table",
        el("caption", caption),
        el("thead", head),
        el("tbody", *body),
        class_=class_ or None,
    )
    return el("div", whole, class_="scroll")


def bar(fraction: float) -> Element:
    """A horizontal bar; what it shows is also said in words beside it."""
    return el(
        "span",
        class_="bar",
        style=f"--w:{100 * min(max(fraction, 0.0), 1.0):.1f}%",
        aria_hidden="true",
    )


@dataclass(frozen=True)
class Scale:
    """A straight map from values to places in a chart."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def svg(title: str, description: str, height: float, *marks: Element) -> Element:
    said = (el("title", title), el("desc", description))
    return el("svg", *said, *marks, viewBox=f"0 0 {WIDTH} {height:g}", role="img")


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Element:
    return el("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str) -> Element:
    place = {"x": f"{x:.2f}", "y": f"{y:.1f}", "width": f"{width:.2f}", "height": f"{height:.1f}"}
    return el("rect", **place, class_=class_)


def text(
    x: float, y: float, said: str, anchor: str = "middle", class_: str | None = None
) -> Element:
    return el("text", said, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)


def axes(
    x: Scale, y: Scale, xs: Mapping[float, str], ys: Mapping[float, str], below: str
) -> Iterator[Element]:
    for value, label in ys.items():
        yield line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid")
        yield text(LEFT - 6, y(value) + 3.5, label, "end")
    for value, label in xs.items():
        yield text(x(value), HEIGHT - BOTTOM + 14, label)
    yield text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, below)


def shade(t: float) -> str:
    """The style of a place between 0, such as the first block, and 1, such as the last one."""
    return f"--t:{t:.3f}"


def _quarters(top: int) -> dict[float, str]:
    return {n: str(n) for n in sorted({round(top * q / 4) for q in range(5)})}


def widths_chart(title: str, description: str, spaces: Sequence[Width]) -> Element:
    """Spaces from first to last: what is kept of each, before all that there was."""
    x = Scale(0, len(spaces), LEFT, WIDTH - RIGHT)
    top = max(s.dim for s in spaces)
    y = Scale(0, top, HEIGHT - BOTTOM, TOP)
    starts: dict[int, int] = {}
    for n, space in enumerate(spaces):
        starts.setdefault(space.block, n)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 10**6) if len(starts) <= 10 * s)
    ticks = {n + 0.5: str(block) for block, n in starts.items() if block % step == 0}
    bars = []
    for n, space in enumerate(spaces):
        left, wide = x(n + 0.09), 0.82 * (x(1) - x(0))
        heights = ((space.dim, "whole"), (space.kept, "kept"))
        rects = [rect(left, y(value), wide, y(0) - y(value), class_) for value, class_ in heights]
        bars.append(el("g", el("title", f"{space.name}: {space.kept} of {space.dim} kept"), *rects))
    return svg(title, description, HEIGHT, *axes(x, y, ticks, _quarters(top), "block"), *bars)


@dataclass(frozen=True)
class Curve:
    """The energies of one unit's directions, falling; ``look`` is the style of its line."""

    name: str
    look: str
    energies: Sequence[float]
    kept: int

    @property
    def shares(self) -> list[float]:
        """Each direction's part of the unit's energy."""
        finite = [e if math.isfinite(e) and e > 0 else 0.0 for e in self.energies]
        largest = max(finite, default=0.0) or 1.0
        total = math.fsum(e / largest for e in finite) or 1.0
        return [e / largest / total for e in finite]


def spectra_chart(title: str, description: str, curves: Sequence[Curve]) -> Element:
    """Curves on a logarithmic scale, each with its cut."""
    shares = [c.shares for c in curves]
    seen = [math.log10(s) for found in shares for s in found if s > 0] or [0.0]
    high = math.ceil(max(seen))
    low = min(max(math.floor(min(seen)), high - DECADES), high - 1)
    longest = max(len(found) for found in shares)
    x = Scale(1, max(longest, 2), LEFT, WIDTH - RIGHT)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    step = -(-(high - low) // 6)
    decades: dict[float, str] = {n: _power(n) for n in range(high, low - 1, -step)}
    xs = {float(max(n, 1)): str(int(max(n, 1))) for n in _quarters(longest)}
    marks = list(axes(x, y, xs, decades, "direction, by falling energy"))
    places = [_Places(found, x, y) for found in shares]
    marks += [_curve(curve, found) for curve, found in zip(curves, places, strict=True)]
    cut = {c.kept for c in curves if c.kept < len(c.energies)}
    if len(cut) == 1:
        marks += _cut(cut.pop(), x)
    else:
        found = [p(c.kept) for c, p in zip(curves, places, strict=True) if c.kept < len(c.energies)]
        marks += [
            el("circle", cx=f"{cx:.1f}", cy=f"{cy:.1f}", r="1.9", class_="dot") for cx, cy in found
        ]
    return svg(title, description, HEIGHT, *marks)


@dataclass(frozen=True)
class _Places:
    """Where the directions of one curve lie in a chart, counted from 1."""

    shares: Sequence[float]
    x: Scale
    y: Scale

    def __call__(self, n: int) -> tuple[float, float]:
        share = self.shares[n - 1]
        return self.x(n), self.y(max(math.log10(share), self.y.low) if share > 0 else self.y.low)


def _curve(curve: Curve, places: _Places) -> Element:
    d = len(places.shares)
    steps = max(min(d, POINTS) - 1, 1)
    chosen = sorted({1 + round(n * (d - 1) / steps) for n in range(steps + 1)})
    path = "M" + "L".join("{:.1f},{:.1f}".format(*places(n)) for n in chosen)
    energy = 100 * math.fsum(places.shares[: curve.kept])
    said = f"{curve.name}: {curve.kept} of {d} directions kept, {energy:.2f} % of the energy"
    drawn = el("path", d=path, class_="curve")
    return el("g", el("title", said), drawn, style=curve.look)


def _cut(cut: int, x: Scale) -> list[Element]:
    """A line through all curves, its label on the side where there is room."""
    side, anchor = (5, "start") if cut < 0.7 * x.high else (-5, "end")
    drawn = line(x(cut), TOP, x(cut), HEIGHT - BOTTOM, "cut")
    return [drawn, text(x(cut) + side, TOP + 9, f"cut at {cut}", anchor, "strong")]


def _power(n: int) -> str:
    return "1" if n == 0 else f"1e{n}"


def errors_chart(
    title: str, description: str, errors: Mapping[str, tuple[str, float]], limit: float
) -> Element:
    """Named errors as bars on a logarithmic scale, with the limit marked on each."""
    known = [
        math.log10(v)
        for v in (limit, *(v for _, v in errors.values()))
        if v > 0 and math.isfinite(v)
    ]
    low, high = math.floor(min([*known, -16])) - 1, math.ceil(max([*known, 0]))
    x = Scale(low, high, 1, WIDTH - 1)
    marks = []
    for n, (name, (said, value)) in enumerate(errors.items()):
        top = 34 * n + 20
        place = high if not math.isfinite(value) else math.log10(value) if value > 0 else low
        marks.append(text(x(low), top - 7, f"{name}: {said}", "start", "strong"))
        marks.append(
            rect(x(low), top, max(x(place) - x(low), 1), 8, "kept" if value <= limit else "control")
        )
        if limit > 0:
            marks.append(
                line(x(math.log10(limit)), top - 2, x(math.log10(limit)), top + 12, "limit")
            )
    bottom = 34 * len(errors) + 18
    step = -(-(high - low) // 8)
    ticks = [v for v in range(high, low, -step) if low < v < high]
    return svg(
        title, description, bottom + 6, *marks, *(text(x(v), bottom, _power(v)) for v in ticks)
    )


@dataclass(frozen=True)
class Bar:
    """A measured value with its quartiles, and what is said of it."""

    name: str
    said: str
    median: float
    low: float
    high: float


def bars_chart(title: str, description: str, bars: Sequence[Bar]) -> Element:
    """Bars from zero, each under its name, with a line from the lower to the upper quartile."""
    x = Scale(0, max([b.high for b in bars if math.isfinite(b.high)], default=0) or 1, 1, WIDTH - 1)
    marks = []
    for n, bar in enumerate(bars):
        top = 34 * n + 20
        marks.append(text(1, top - 7, f"{bar.name}: {bar.said}", "start", "strong"))
        marks.append(rect(1, top, max(x(bar.median) - 1, 1), 8, "kept"))
        marks.append(line(x(bar.low), top + 4, x(bar.high), top + 4, "limit"))
    return svg(title, description, 34 * len(bars) + 6, *marks)


def ramp(first: str, last: str) -> Element:
    """The legend of the colours of depth."""
    steps = [el("span", style=shade(n / 15)) for n in range(16)]
    return el(
        "p", first, el("span", *steps, class_="ramp", aria_hidden="true"), last, class_="legend"
    )
