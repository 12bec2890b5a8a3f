"""Pages from templates: everything escaped, nothing loaded, and nothing run but a script of ours by its digest."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .figures import Drawing, clean
from .grid import Grid, code, fenced, markdown

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, sentences, tables, drawings, and what is said where there are none."""

    title: str
    texts: Sequence[str] = ()
    grids: Sequence[Grid] = ()
    drawings: Sequence[Drawing] = ()
    missing: str = ""
    badge: tuple[str, str] | None = None

    @property
    def empty(self) -> bool:
        return bool(self.missing) and not (self.grids or self.drawings)


@cache
def _environment(kind: str, folder: Path) -> Environment:
    """Templates whose every value is escaped, for HTML or for Markdown."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        if isinstance(value, Markup):  # made by a macro or a filter of ours
            return value
        text = clean(str(value))
        return text if kind == "html" else Markup(markdown(text))

    made = Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    made.filters |= {
        "code": lambda text: Markup(code(clean(text))),
        "fenced": lambda text, language: Markup(fenced(clean(text), language)),
        "table": lambda grid: Markup(clean(grid.markdown())),
    }
    return made


def raw(text: str) -> Any:
    """Text that is YAML or code already, and goes into a template as it is."""
    from markupsafe import Markup

    return Markup(clean(text))


def card(template: str, **values: Any) -> str:
    """Markdown by a template."""
    return _environment("markdown", HERE).get_template(f"{template}.md.j2").render(**values)


def page(template: str, *, folder: Path = HERE, script: str = "", **values: Any) -> str:
    """A page by a template; ``folder`` holds those of another room."""
    made = _environment("html", folder).get_template(f"{template}.html.j2")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (HERE / "style.css").read_text(encoding="utf-8")
    return made.render(kind=template, style=style, script=script, digest=digest, **values).lstrip()
