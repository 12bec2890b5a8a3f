"""Patterns as text and back: `j<8{i<64{qk@^-1[128j+i:+2:64]}}`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .pattern import RIGID, Loop, Node, Pattern, Run, Symbol

VARIABLES = "ijklmnopqrstuvwxyzabcdefgh"  # of loops, the innermost first


def write(pattern: Sequence[Node], widths: Mapping[str, int]) -> str:
    """The pattern as text. A run of a whole space is the space's name alone."""
    return " ".join(_write(node, widths) for node in pattern)


def _write(node: Node, widths: Mapping[str, int]) -> str:
    if isinstance(node, Loop):
        return f"{VARIABLES[node.variable]}<{node.count}{{{write(node.body, widths)}}}"
    if node.symbol == RIGID:
        return f"-[:+{node.count}]" if node.count else "-"
    whole = node.count == widths.get(node.symbol.space)
    if whole and node.start == 0 and node.step == 1 and not node.shifts:
        return str(node.symbol)
    terms = [f"{'' if c == 1 else c}{VARIABLES[v]}" for v, c in node.shifts]
    if node.start or not terms:
        terms.append(str(node.start))
    step = "" if node.step == 1 else f":{node.step}"
    return f"{node.symbol}[{'+'.join(terms)}:+{node.count}{step}]"


TOKEN = re.compile(
    r"\s*(?:(?P<variable>[a-z])<(?P<times>\d+)\{|(?P<close>\})"
    r"|(?P<symbol>-|(?:[A-Za-z_][\w.]*@?)?(?:\^[-\d,/]+)?)"
    r"(?:\[(?P<start>[-+\da-z]*):\+(?P<count>\d+)(?::(?P<step>-?\d+))?\])?)"
)


def read(text: str, widths: Mapping[str, int]) -> Pattern:
    """The pattern that ``write`` wrote. Raises ValueError, saying what cannot be read."""
    stack: list[list[Node]] = [[]]
    opened: list[tuple[int, int]] = []
    p, text = 0, text.strip()
    while p < len(text):
        m = TOKEN.match(text, p)
        if m is None or not m[0].strip():
            raise ValueError(f"'{text[p:]}' cannot be read")
        p = m.end()
        if m["variable"]:
            opened.append((VARIABLES.index(m["variable"]), int(m["times"])))
            stack.append([])
        elif m["close"]:
            if not opened:
                raise ValueError("'}' closes no loop")
            body = tuple(stack.pop())
            stack[-1].append(Loop(*opened.pop(), body))
        else:
            stack[-1].append(_run(m, widths, {v for v, _ in opened}))
    if opened:
        raise ValueError("a loop is not closed")
    return tuple(stack[0])


def _run(m: re.Match[str], widths: Mapping[str, int], variables: set[int]) -> Run:
    symbol = Symbol.parse(m["symbol"])
    if symbol == RIGID:
        return Run(RIGID, int(m["count"] or 0))
    if symbol.space and symbol.space not in widths:
        raise ValueError(f"there is no space '{symbol.space}'")
    if m["count"] is None:
        return Run(symbol, widths[symbol.space])
    start, shifts = 0, []
    for term in m["start"].split("+"):
        if term and term[-1] in VARIABLES:
            coefficient = term[:-1]
            shifts.append((VARIABLES.index(term[-1]), int(coefficient) if coefficient else 1))
        else:
            start = int(term)
    if not {v for v, _ in shifts} <= variables:
        raise ValueError(f"'{m[0].strip()}' names a loop that is not around it")
    return Run(symbol, int(m["count"]), start, int(m["step"] or 1), tuple(shifts))
