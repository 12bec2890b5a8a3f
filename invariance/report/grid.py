"""A table of words that terminal, page, Markdown and LaTeX show alike."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "×": r"$\times$",
    "±": r"$\pm$",
    "–": "--",
    "…": r"\ldots{}",
    "‖": r"$\|$",
    "Δ": r"$\Delta$",
    "→": r"$\to$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "−": "$-$",
    "\xa0": "~",
}
NEGATIVE = re.compile(r"(?<![^ (])-(?=\d)")  # the sign of a number, which is no hyphen
PACKAGES, OTHERS = "\\usepackage{booktabs}", "names in other scripts want lualatex or xelatex"
NEEDS = f"% {PACKAGES}; {OTHERS}\n"  # the first line of a file


@dataclass(frozen=True)
class Grid:
    """A caption, columns, and rows that their first cell names; two spaces before a name make it a part of one above."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1  # columns of words, before those of numbers
    texts: bool = False  # whether cells are long texts, side by side

    def table(self) -> Table:
        """For the terminal: what does not fit is folded, and nothing is cut off."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        title = Text(self.caption) if self.caption else None
        made = Table(
            title=title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for n, name in enumerate(self.columns):
            justify = "left" if n < self.left else "right"
            made.add_column(Text(name), justify=justify, overflow="fold")  # type: ignore[arg-type]
        if self.texts:
            made.expand = True
            for column in made.columns:
                column.ratio = 1
        for row in self.rows:
            made.add_row(*(Text(cell) for cell in row))
        return made

    def markdown(self) -> str:
        """For model cards; whatever a name holds is shown as text."""
        rule = ["---" if n < self.left else "---:" for n in range(len(self.columns))]
        lines = [[markdown(c) for c in line] for line in (self.columns, *self.rows)]
        lines.insert(1, rule)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def latex(self) -> str:
        """For papers: a table of booktabs."""
        head, *body = (" & ".join(map(latex, line)) + r" \\" for line in (self.columns, *self.rows))
        kinds = "l" * self.left + "r" * (len(self.columns) - self.left)
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{latex(self.caption)}}}"]
        lines += [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *body]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def latex(text: str) -> str:
    indent = r"\quad " if text.startswith("  ") else ""
    line = NEGATIVE.sub("−", " ".join(text.strip().split(" ")))
    return indent + "".join(LATEX.get(c, c) for c in line)


def markdown(text: str) -> str:
    """Text as Markdown that shows it: no HTML, link, emphasis or end of a cell in it means anything."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", line)


def code(text: str) -> str:
    """Text as code within a line of Markdown, between more backticks than it holds."""
    line = " ".join(text.split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    room = " " if "`" in line else ""
    return f"{ticks}{room}{line}{room}{ticks}"


def fenced(text: str, language: str) -> str:
    """Text as a block of code, behind a fence that no line of it is."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
