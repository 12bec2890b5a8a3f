"""Inputs for certificates: tokens that were not traced, positions beyond every length that a config names, loud weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .certify import Probe, outputs
from .trace import Example

Tokens = Callable[[int, int, int], Example]  # sequences, length, seed

LONG = 700  # positions, unless a config names a greater length that can be reached
LONGEST = 5000
LOUD = (4.0, 30.0)  # how much all matrices are multiplied by, so that clips and caps are reached

_LENGTH = re.compile(r"position|window|ctx|seq_len|sequence_length|max_length|chunk|block_length")


def lengths(config: Mapping[str, Any]) -> Iterator[int]:
    """Every length that a config names, in sub-configs and tables too."""
    for key, v in config.items():
        if isinstance(v, Mapping):
            yield from lengths(v)
        elif isinstance(v, int) and not isinstance(v, bool) and _LENGTH.search(key) and v > 0:
            yield v


def probes(model: nn.Module, tokens: Tokens, config: Mapping[str, Any]) -> list[Probe]:
    """Short unseen inputs first (controls use the first), then loud ones, then the longest that the model takes."""
    out = [Probe("unseen tokens", tokens(4, 11, 101))]
    out += [Probe(f"weights × {x:g}", tokens(4, 11, 102), loud=x) for x in LOUD]
    beyond = [n + 1 for n in sorted(set(lengths(config))) if n < LONGEST]
    longest = longest_that_runs(model, tokens, sorted({LONG, *beyond}, reverse=True))
    if longest is not None:
        out.append(longest)
    return out


def longest_that_runs(model: nn.Module, tokens: Tokens, wanted: Sequence[int]) -> Probe | None:
    """A table of learned positions ends somewhere; then one position less than a length that a config names."""
    for n in [*wanted, *(m - 1 for m in wanted)]:
        try:
            outputs(model, tokens(1, n, 103))
        except (IndexError, RuntimeError, ValueError):
            continue
        return Probe(f"{n} positions", tokens(1, n, 103))
    return None
