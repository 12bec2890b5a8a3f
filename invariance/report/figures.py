"""Figures that are the same bytes every time: plain SVG for pages and papers, PDF beside it, text as text."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import replacing
from .units import short

if TYPE_CHECKING:  # matplotlib takes a second to import, and is needed where something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, KEPT, WHOLE, OTHER = "#1c1e21", "#5c626b", "#3a66b1", "#dfe5ee", "#b9541f"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # names are names, whatever signs they hold
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e4e1",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
WIDTH, HEIGHT, ROW = 4.7, 2.7, 0.17  # inches: of a figure, and of a line of its legend
LOG_FROM = 5  # values whose largest is so many times the least stand on a logarithmic axis
BESIDE, LETTERS = 26, 60  # of a legend: letters of names that stand two in a row, the most of one
CLIPPED, STRETCH, LEAST = 3, 2.5, 3.0  # see ``ceiling``
MARKERS, LINES = "osD^vP*X", ("-", "--", ":")


def clean(text: str) -> str:
    """Without the characters that neither HTML, XML nor a UTF-8 file can hold."""
    return re.sub("[^\t\n\r -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def elided(name: str, letters: int) -> str:
    """A name of so many letters at most, of which the middle is left out."""
    half = (letters - 1) // 2
    return clean(name if len(name) <= letters else f"{name[:half]}…{name[-half:]}")


@dataclass
class Drawing:
    """A figure under the name of its file; ``said`` are words that its marks show where a mouse rests on them."""

    name: str
    title: str
    caption: str
    figure: Figure
    said: dict[str, str] = field(default_factory=dict)

    def tip(self, words: str) -> str:
        """An id for a mark that shall show these words."""
        self.said[found := f"tip-{len(self.said)}"] = words
        return found

    @cached_property
    def svg(self) -> str:
        text = self._saved("svg", {"Date": None, "Creator": None, "Format": None, "Type": None})
        text = text[text.index("<svg") :].replace(' target="_blank"', "")
        text = re.sub(
            r'(<g id="|<a xlink:href="[^"]*" id=")([A-Za-z][\w.]*_\d+")', rf"\1{self.name}-\2", text
        )
        for mark, words in self.said.items():
            title = f"<title>{escape(words)}</title>"
            text = text.replace(f'<g id="{mark}">', f"<g>{title}")
        return clean(
            text.replace("<svg ", f'<svg role="img" aria-label="{escape(self.title)}" ', 1)
        )

    def pdf(self) -> bytes:
        return self._saved("pdf", {"CreationDate": None, "Creator": None, "Producer": None})

    def _saved(self, kind: str, metadata: Mapping[str, None]) -> Any:
        made: Any = io.StringIO() if kind == "svg" else io.BytesIO()
        with _style(**{"svg.hashsalt": self.name}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a page's reader has other fonts
            self.figure.savefig(made, format=kind, metadata=metadata)
            self.figure.set_layout_engine("none")  # places are found once, and kept
        return made.getvalue()


@contextmanager
def _style(**more: Any) -> Iterator[None]:
    from matplotlib import style

    with style.context(["default", {**STYLE, **more}], after_reset=True):
        yield


@contextmanager
def drawing(
    name: str, title: str, caption: str, height: float = HEIGHT
) -> Iterator[tuple[Drawing, Axes]]:
    """An empty figure and its axes, to draw in. It bears its title, so that it can stand alone."""
    from matplotlib.figure import Figure

    with _style():
        safe = "".join(c if c.isalnum() else "-" for c in name)
        made = Drawing(safe, title, caption, Figure(figsize=(WIDTH, height)))
        axes = made.figure.add_subplot()
        axes.set_title(clean(title))
        yield made, axes


def write(folder: Path, drawings: Iterable[Drawing]) -> None:
    """Every drawing as an SVG and as a PDF file."""
    for each in drawings:
        with replacing(folder / f"{each.name}.svg") as path:
            path.write_text(
                re.sub(r"</?a\b[^>]*>", "", each.svg), encoding="utf-8"
            )  # a page's links
        with replacing(folder / f"{each.name}.pdf") as path:
            path.write_bytes(each.pdf())


# --- Series and their legend.


def shade(t: float) -> Any:
    """The colour of a place between 0, such as the first block, and 1, such as the last one."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * t)


def look(n: int) -> dict[str, Any]:
    """What the n-th series is drawn with; colour, marker and dashes tell many apart, in print too."""
    return {
        "color": f"C{n % 10}",
        "marker": MARKERS[n % len(MARKERS)],
        "linestyle": LINES[n // 10 % len(LINES)],
    }


def legend(made: Drawing, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """The names of series below the axes; the figure grows by as much."""
    from matplotlib.lines import Line2D

    names = [elided(n, LETTERS) for n in looks]
    across = 2 if len(names) > 1 and max(map(len, names)) <= BESIDE else 1
    keys = [Line2D([], [], **each) for each in looks.values()]
    made.figure.set_figheight(made.figure.get_figheight() + ROW * math.ceil(len(keys) / across))
    place: dict[str, Any] = {"loc": "outside lower left", "ncols": across, "labelspacing": 0.25}
    drawn = made.figure.legend(keys, [f"key {n}" for n in range(len(keys))], **place)
    for text, name in zip(drawn.get_texts(), names, strict=True):
        text.set_text(name)  # a label that begins with _ would be left out


# --- Axes.


def ceiling(values: Sequence[float]) -> float | None:
    """The largest value that is drawn to scale, where a few would flatten the rest; None where none does.

    On a logarithmic axis, as few as possible of the largest are cut off, a third at most, where with all of them the
    axis would be 2.5 times as long, and reach from the least to three times as much.
    """
    logs = sorted(math.log10(v) for v in values if v > 0)
    if len(logs) < 3 or len(logs) < len(values) or logs[-1] - logs[0] < math.log10(LEAST):
        return None
    for kept in range(len(logs) - 1, len(logs) - len(logs) // CLIPPED - 1, -1):
        if logs[-1] - logs[0] >= STRETCH * (logs[kept - 1] - logs[0]):
            return 10 ** logs[kept - 1] * (1 + 1e-9)
    return None


def scale(axes: Axes, which: str, values: Sequence[float], label: str, exact: bool = False) -> None:
    """An axis over values, logarithmic where they differ much; ``exact`` marks values, where they are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    getattr(axes, f"set_{which}label")(clean(label))
    low, high = min(values), max(values)
    log = low > 0 and high / low > LOG_FROM
    getattr(axes, f"set_{which}scale")("log" if log else "linear")
    room = (high / low) ** 0.06 if log else 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    limits = (low / room, high * room) if log else (low - room, high + room)
    getattr(axes, f"set_{which}lim")(*limits)
    steps = (1.0,) if high > 1e3 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps) if log else MaxNLocator(6))
    if exact and len(set(values)) <= 7:
        axis.set_ticks(sorted(set(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(short))


def clip(axes: Axes, made: Drawing, beyond: Sequence[float], top: float | None) -> None:
    """Say below the title which values lie beyond the top of the axis, where they are marked."""
    if top is None:
        return
    least, most, bound = (short(float(f"{v:.3g}")) for v in (min(beyond), max(beyond), top))
    span = most if least == most else f"{least} to {most}"
    said = f"▲ not to scale: {len(beyond)} above {bound}, at {span}"
    made.caption += f"; {said}"
    ground: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    axes.text(
        0.99,
        0.94,
        said,
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=7.5,
        bbox=ground,
        zorder=9,
    )
