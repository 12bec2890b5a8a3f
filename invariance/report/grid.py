"""A table of words that terminal, HTML page and Markdown show alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from rich.table import Table
from rich.text import Text

from . import charts


@dataclass(frozen=True)
class Grid:
    """A caption, columns, and rows that their first cell names."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def table(self) -> Table:
        made = Table(*self.columns, title=Text(self.caption), title_justify="left")
        for column in made.columns[1:]:
            column.justify = "right"
        for row in self.rows:
            made.add_row(*(Text(cell) for cell in row))
        return made

    def element(self) -> Element:
        return charts.table(self.caption, self.columns, self.rows)

    def markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join(
            f"| {' | '.join(' '.join(c.replace('|', '¦').split()) for c in line)} |"
            for line in lines
        )
