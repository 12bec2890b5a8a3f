"""A derived layout as a readable text of a few kB, and back.

    layout 1  what it is of
    space residual     O         4096
    axis  model.embed_tokens.weight          1  residual

    layers model.layers.*  0-31
    space vo@          GL        1024 in 8 of 128: i<8{[128i:+128]}
    axis  self_attn.v_proj.weight            0  vo@^-1
    axis  self_attn.v_proj.weight            1  residual  × input_layernorm.weight  reads 0

An axis is its parameter, its dims, its labels (&), gains that it takes up (× or ÷), whether it is a gain, and the
points of the stream where it reads or behind which it writes. Fields are two spaces apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ...core.errors import InputError
from . import pattern_text as pattern
from .description import Axis, Description, Fold, Gain, Kind, Move, Part, Point, Space

FORMAT = 1
SIGNS = {1: "×", -1: "÷"}
SPACE = re.compile(
    r"space (?P<name>\S+) +(?P<kind>[A-Z]+\d?)(?:·(?P<scales>[R±]+))? +(?P<width>\d+)"
    r"(?: in (?P<copies>\d+) of (?P<size>\d+): (?P<blocks>.+))?(?:: (?P<moves>[()\d |-]+))?"
)
LAYERS = re.compile(r"layers (?P<prefix>\S*)\*  (?P<layers>[\d,-]+)")
POINT = re.compile(r"(reads|writes)((?: -?\d+)+)")


def write(description: Description) -> str:
    """The text. The same description gives the same text."""
    widths = {s.name: s.width for s in description.whole.spaces}
    out = [f"layout {FORMAT}  {description.what}", *_body(description.whole, widths)]
    for part in description.layers:
        out += ["", f"layers {part.prefix}*  {_ranges(part.layers)}", *_body(part, widths)]
    return "\n".join(out) + "\n"


def _body(part: Part, widths: Mapping[str, int]) -> list[str]:
    widths = {**widths, **{s.name: s.width for s in part.spaces}}
    lines = [_space(s) for s in part.spaces]
    lines += [_axis(a, widths) for a in part.axes]
    lines += [f"rigid {n}" for n in part.rigid]
    return lines + [f"unseen {n}" for n in part.unseen]


def _ranges(numbers: tuple[int, ...]) -> str:
    runs = list[list[int]]()
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}-{b}" if a < b else str(a) for a, b in runs)


def _space(s: Space) -> str:
    kind = s.kind.value + (f"·{s.scales}" if s.scales else "")
    line = f"space {s.name:12} {kind:8} {s.width:6}"
    if s.blocks:
        line += f" in {s.copies} of {s.width // s.copies}: {pattern.write(s.blocks, {})}"
    if s.moves:
        line += ": " + " | ".join(_move(move) for move in s.moves)
    return line


def _move(move: Move) -> str:
    """Transpositions side by side are told as one: (0 4)(1 5) is (0-1 4-5)."""
    runs = list[list[int]]()
    for a, b in move:
        if runs and (a, b) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
            runs[-1][2] += 1
        else:
            runs.append([a, b, 1])
    return "".join(
        f"({a} {b})" if n == 1 else f"({a}-{a + n - 1} {b}-{b + n - 1})" for a, b, n in runs
    )


def _moved(text: str) -> Move:
    pairs = list[tuple[int, int]]()
    for a, last, b in re.findall(r"\((\d+)(?:-(\d+))? (\d+)(?:-\d+)?\)", text):
        pairs += [(int(a) + i, int(b) + i) for i in range(int(last or a) - int(a) + 1)]
    return tuple(pairs)


def _axis(a: Axis, widths: Mapping[str, int]) -> str:
    fields = [f"axis  {a.parameter:34}", ".".join(map(str, a.dims))]
    fields.append(" & ".join(pattern.write(label, widths) for label in a.labels))
    for f in a.folds:
        entries = f": {pattern.write(f.entries, {})}" if f.entries else ""
        fields.append(f"{SIGNS[f.power]} {f.gain}{entries}")
    if a.gain is not None:
        offset = f" + {a.gain.offset:g}" if a.gain.offset else ""
        fields.append(f"gain{offset}{'' if a.gain.folded else ' unfolded'}")
    for writes, word in ((False, "reads"), (True, "writes")):
        numbers = [str(p.number) for p in a.points if p.writes == writes]
        if numbers:
            fields.append(f"{word} {' '.join(numbers)}")
    return "  ".join(fields)


def read(text: str, file: str = "layout") -> Description:
    """The description that a text holds. Raises InputError with the line where it is not as ``write`` writes it."""
    lines = text.split("\n")
    head = re.fullmatch(rf"layout {FORMAT}  (.*)", lines[0])
    if head is None:
        raise InputError(f"{file}:1: a layout begins with `layout {FORMAT}  …`. Derive it anew.")
    reader = _Reader(file)
    for number, line in enumerate(lines[1:], 2):
        reader.line(number, line)
    made = Description(head[1], reader.parts[0].part(), tuple(p.part() for p in reader.parts[1:]))
    for number, (was, now) in enumerate(
        zip(lines, [*write(made).split("\n"), ""], strict=False), 1
    ):
        if was != now:
            raise InputError(
                f"{file}:{number}: reads `{was}`, and stands for `{now}`. Derive it anew."
            )
    return made


class _Draft:
    """A part while it is read."""

    def __init__(self, prefix: str, layers: tuple[int, ...], widths: Mapping[str, int]):
        self.prefix, self.layers = prefix, layers
        self.widths = dict(widths)
        self.spaces, self.axes = list[Space](), list[Axis]()
        self.rigid, self.unseen = list[str](), list[str]()

    def part(self) -> Part:
        return Part(
            self.prefix,
            self.layers,
            tuple(self.spaces),
            tuple(self.axes),
            tuple(self.rigid),
            tuple(self.unseen),
        )


class _Reader:
    def __init__(self, file: str):
        self.file = file
        self.parts = [_Draft("", (), {})]

    def line(self, number: int, line: str) -> None:
        kinds: dict[str, Callable[[str], None]] = {
            "space": self.space,
            "axis": self.axis,
            "rigid": lambda x: self.parts[-1].rigid.append(x.split()[1]),
            "unseen": lambda x: self.parts[-1].unseen.append(x.split()[1]),
            "layers": self.layers,
        }
        word = line.split(" ", 1)[0]
        if not word:
            return
        try:
            if word not in kinds:
                raise ValueError(f"a line begins with one of {', '.join(kinds)}")
            kinds[word](line)
        except (ValueError, IndexError) as e:
            raise InputError(f"{self.file}:{number}: `{line.strip()}`: {e}. Derive it anew.") from e

    def layers(self, line: str) -> None:
        m = LAYERS.fullmatch(line)
        if m is None:
            raise ValueError("layers are written `layers PREFIX*  0-31`")
        numbers = list[int]()
        for run in m["layers"].split(","):
            first, _, last = run.partition("-")
            numbers += range(int(first), int(last or first) + 1)
        self.parts.append(_Draft(m["prefix"], tuple(numbers), self.parts[0].widths))

    def space(self, line: str) -> None:
        m = SPACE.fullmatch(line)
        if m is None:
            raise ValueError("a space is written `space NAME KIND WIDTH`")
        moves = tuple(_moved(move) for move in (m["moves"] or "").split(" | ") if move)
        part = self.parts[-1]
        blocks = pattern.read(m["blocks"], {}) if m["blocks"] else ()
        made = Space(
            m["name"],
            Kind(m["kind"]),
            int(m["width"]),
            int(m["copies"] or 1),
            blocks,
            m["scales"] or "",
            moves,
        )
        part.spaces.append(made)
        part.widths[made.name] = made.width

    def axis(self, line: str) -> None:
        name, dims, labels, *more = re.split(r"  +", line.removeprefix("axis").strip())
        part = self.parts[-1]
        folds, points, gain = list[Fold](), list[Point](), None
        for field in more:
            if field[0] in SIGNS.values():
                g, _, entries = field[2:].partition(": ")
                power = 1 if field[0] == SIGNS[1] else -1
                folds.append(Fold(g, power, pattern.read(entries, {}) if entries else ()))
            elif field.startswith("gain"):
                m = re.fullmatch(r"gain(?: \+ (\S+))?( unfolded)?", field)
                if m is None:
                    raise ValueError("a gain is written `gain`, `gain + 1`, `gain unfolded`")
                gain = Gain(float(m[1] or 0), not m[2])
            elif p := POINT.fullmatch(field):
                points += [Point(p[1] == "writes", int(n)) for n in p[2].split()]
            else:
                raise ValueError(f"`{field}` says nothing of an axis")
        made = tuple(pattern.read(label, part.widths) for label in labels.split(" & "))
        dim = tuple(int(d) for d in dims.split("."))
        part.axes.append(Axis(name, dim, made, tuple(folds), gain, tuple(points)))
