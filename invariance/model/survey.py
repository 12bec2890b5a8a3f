"""Every causal type of the installed transformers, tiny: what is derived of it and certified, or why it is refused."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import torch
from pebble import ProcessPool
from torch import nn
from transformers import PreTrainedModel

from invariance.core.errors import InputError

from .cuttable import cuttable
from .derive import Block, Certificate, Derived, Kind, certify, derive
from .derive.certify import TOLERANCE
from .derive.probes import probes
from .derive.record import weights_of
from .described.source import source
from .tiny import Tiny, tiny

SECONDS = 180  # per type
MEMORY = 8 << 30  # bytes of address space per type


@dataclass(frozen=True)
class Row:
    """One type. spaces: "residual O(32)" and the like, each with how many there are of it; ``reason``: of a refusal.

    coverage: share of the matrices that the examples reached which some group changes. unseen: share that they did not.
    cuts: kinds of spaces that were cut and seen to hold, each with whether a stock config says it. uncut: why others were not.
    """

    type: str
    certified: bool
    reason: str = ""
    spaces: dict[str, int] = field(default_factory=dict)
    scales: int = 0
    signs: int = 0
    error: float = float("inf")
    control: float = 0.0
    longest: str = ""
    coverage: float = 0.0
    unseen: float = 0.0
    refuted: tuple[str, ...] = ()
    rigid: tuple[str, ...] = ()
    cuts: dict[str, bool] = field(default_factory=dict)
    uncut: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def has(self, stem: str, *kinds: str) -> bool:
        """Whether a space of one of these kinds was certified."""
        return any(name.startswith(tuple(f"{stem} {k}(" for k in kinds)) for name in self.spaces)


def causal_types() -> list[str]:
    """All types of the installed transformers that have a causal model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def families(
    types: Sequence[str] | None = None,
    progress: Callable[[Row], None] = lambda row: None,
    jobs: int = 2,
    seconds: float = SECONDS,
) -> Iterator[Row]:
    """A row for each type, in order; each is worked out in a process of its own, with limits of time and memory."""
    known = causal_types()
    types = known if types is None else list(types)
    unknown = sorted(set(types) - set(known))
    if unknown:
        raise InputError(
            f"families: {', '.join(unknown)}: no causal type of the installed transformers has this name"
        )
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers"])
    pool = ProcessPool(max_workers=jobs, max_tasks=1, context=context)
    try:
        futures = [(kind, pool.schedule(work, args=(kind,), timeout=seconds)) for kind in types]
        for kind, future in futures:
            try:
                row = future.result()
            except TimeoutError:
                row = Row(kind, False, f"not done after {seconds:g} s", seconds=seconds)
            except Exception as error:  # a process that died
                row = Row(
                    kind, False, f"its process ended: {type(error).__name__}: {str(error)[:120]}"
                )
            progress(row)
            yield row
    finally:  # Ctrl-C does not wait for what is left
        pool.stop()
        pool.join()


def work(kind: str) -> Row:
    """The row of one type; nothing is raised."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        made = tiny(kind)
        row = examined(kind, made)
    except InputError as error:
        row = Row(kind, False, str(error).removeprefix(f"{kind}: "))
    except Exception as error:
        row = Row(kind, False, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    return replace(row, seconds=time.monotonic() - start)


def examined(kind: str, made: Tiny) -> Row:
    """Derived from a few tokens, certified on others."""
    examples = [made.tokens(4, 12), *(made.tokens(8, 16, seed) for seed in (2, 3, 4))]
    derived = derive(made.model, examples)
    tried = probes(made.model, made.tokens, made.config.to_dict())
    certificate = certify(made.model, derived, tried)
    covered, missed = coverage(made.model, derived, certificate)
    cuts = []
    if certificate.passed and isinstance(made.model, PreTrainedModel):
        inputs = [made.tokens(8, 32), made.tokens(4, 11, 101)]
        accepted = source(derived, made.model, certificate.blocks, certificate.scales)
        cuts = cuttable(made.model, accepted, inputs)
    return Row(
        type=kind,
        certified=certificate.passed,
        reason="" if certificate.passed else refusal(certificate),
        spaces=spaces(derived, certificate),
        scales=derived.scales.free_scales if certificate.scales else 0,
        signs=derived.scales.free_signs if certificate.scales else 0,
        error=certificate.error,
        control=certificate.control,
        longest=tried[-1].name,
        coverage=covered,
        unseen=missed,
        refuted=tuple(f"{k}: {v}" for k, v in certificate.refuted.items()),
        rigid=tuple(sorted(derived.unknown)),
        cuts={c.kind: c.plain for c in cuts if c.holds},
        uncut={c.kind: c.reason for c in cuts if not c.holds},
    )


def refusal(c: Certificate) -> str:
    if not c.blocks:
        return "nothing was derived that holds"
    if not c.error <= TOLERANCE:
        return f"what was derived moves the outputs by {c.error:.1e}"
    return f"a control moves the outputs by {c.control:.1e} only"


def spaces(derived: Derived, c: Certificate) -> dict[str, int]:
    """How many blocks there are of each name, group and size; signed: a permutation with signs, scaled: with scales."""
    counts = Counter(f"{b.stem} {group(derived, b, c.scales)}({len(b.classes)})" for b in c.blocks)
    return dict(sorted(counts.items()))


def group(derived: Derived, b: Block, scales: bool) -> str:
    if b.kind is not Kind.PERM or not scales:
        return str(b.kind)
    roots = {
        derived.ids.scale(p.id)[0]
        for c in b.classes
        for p in derived.places[c]
        if not derived.is_gain(p.id)
    }
    scaled = any(
        r in roots
        for rs, basis in derived.scales.logs
        for r, v in zip(rs, basis, strict=True)
        if v.any()
    )
    signed = any(
        r in roots
        for rs, basis in derived.scales.signs
        for r, v in zip(rs, basis.T, strict=True)
        if v.any()
    )
    return "PERM" + ("+" if scaled else "") + ("±" if signed else "")


def coverage(model: nn.Module, derived: Derived, c: Certificate) -> tuple[float, float]:
    """Shares of the matrices' elements: changed by some group, of those that were reached; and not reached."""
    sizes = {n: w.numel() for n, w in weights_of(model).items() if w.dim() > 1}
    reached = {n: size for n, size in sizes.items() if n not in derived.unseen}
    touched = {name for b in c.blocks for name, _ in b.where}
    total = sum(reached.values())
    covered = sum(size for n, size in reached.items() if n in touched)
    return covered / max(1, total), 1 - total / max(1, sum(sizes.values()))


# ---- the page


PAGE = """# Every causal type of transformers

Generated by `invariance families`; do not edit. Each type's default config was made small by rules, its weights are random.
What may be changed was derived from one forward pass, and certified: all groups at once, on tokens that were not traced,
with all matrices times 4 and 30, and at positions beyond every length that the config names (or as many as it has).

- residual: the stream. vo: values and the output projection behind them. qk: queries and keys. ch: channels of an MLP and the
  like. inner: other spaces under a norm. heads, experts: whole ones that change places.
- GL: any invertible matrix. O: rotations. O1: rotations that fix the vector of ones (LayerNorm). C: complex scales of rotary
  pairs. PERM: permutations, with scales (+) and signs (±). NODES: swaps.
- cut: what was made narrower in the family's own modules and then computed what the whole model computes with zeros there
  (to 1e-10, in float64), while zeros elsewhere did not. Recipes cut it by these names (the stream as `residual`). mlp: channels.
  stream: the residual stream. vo: values alone. heads, experts: whole ones. With a *, no stock config says the widths, and the
  checkpoint is the family's class with a record of them. A kind that is derived and not listed was tried: the modules do not
  run so (most have one width for queries, keys and values), or compute something else.
- error: relative, of all that stands in the row at once. control: the least that the outputs move when one side alone is
  changed. reached: the share of the matrices that text reaches. covered: the share of those that some group changes.

"""


def page(rows: Sequence[Row]) -> str:
    """docs/families.md."""
    return PAGE + table(rows)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown: what was certified, then what was refused and why."""
    done = [r for r in rows if r.certified]
    lines = [
        f"{len(done)} of {len(rows)} types certified.",
        "",
        *(f"- {what}: {n}" for what, n in totals(rows).items()),
        "",
        "| type | cut | spaces | scales, signs | error | control | longest | reached | covered |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(line_of, done),
        "",
        "| refused | why |",
        "|---|---|",
        *(f"| {r.type} | {escaped(r.reason)} |" for r in rows if not r.certified),
    ]
    return "\n".join(lines) + "\n"


KINDS = {
    "mlp": "channels of MLPs",
    "stream": "stream",
    "vo": "values",
    "heads": "heads",
    "experts": "experts",
}


def totals(rows: Sequence[Row]) -> dict[str, int]:
    """How many types have what."""
    return {
        "certified": sum(r.certified for r in rows),
        "stream rotated (O, O fixing ones, or signed permutations)": sum(
            r.certified and r.has("residual", "O", "O1", "PERM±", "PERM+±") for r in rows
        ),
        "stream by O or O fixing ones": sum(
            r.certified and r.has("residual", "O", "O1") for r in rows
        ),
        "VO by GL": sum(r.certified and r.has("vo", "GL") for r in rows),
        "queries and keys (GL, or complex scales of pairs)": sum(
            r.certified and r.has("qk", "GL", "C") for r in rows
        ),
        "channels permuted": sum(
            r.certified and r.has("ch", "PERM", "PERM+", "PERM±", "PERM+±") for r in rows
        ),
        "heads swapped": sum(r.certified and r.has("heads", "NODES") for r in rows),
        "experts swapped": sum(r.certified and r.has("experts", "NODES") for r in rows),
        "nothing refuted": sum(r.certified and not r.refuted for r in rows),
        **{f"{what} cut": sum(kind in r.cuts for r in rows) for kind, what in KINDS.items()},
        **{
            f"{what} cut, as a stock config says": sum(r.cuts.get(kind, False) for r in rows)
            for kind, what in KINDS.items()
        },
    }


def line_of(r: Row) -> str:
    named = ", ".join(name if n == 1 else f"{n} × {name}" for name, n in r.spaces.items())
    note = f"; refuted: {'; '.join(r.refuted)}" if r.refuted else ""
    cells: list[Any] = [
        r.type,
        ", ".join(kind if plain else f"{kind}*" for kind, plain in r.cuts.items()) or "-",
        escaped(named + note),
        f"{r.scales}, {r.signs}",
        f"{r.error:.0e}",
        f"{r.control:.0e}",
        r.longest,
        f"{1 - r.unseen:.0%}",
        f"{r.coverage:.0%}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
