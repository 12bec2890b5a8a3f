"""Tiny models and inputs for tests of the derivation, and what was certified of them."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import nn

from invariance.model.derive import Certificate, Derived, Kind, Probe, certify, derive
from invariance.model.derive.probes import probes
from invariance.model.derive.trace import Example
from invariance.model.tiny import Tiny, tiny

Found = Counter[tuple[str, Kind, int]]


@cache
def made(kind: str) -> Tiny:
    return tiny(kind)


@cache
def derived(kind: str) -> Derived:
    small = made(kind)
    return derive(small.model, [small.tokens(4, 12), *(small.tokens(8, 16, s) for s in (2, 3, 4))])


@cache
def certified(kind: str) -> Certificate:
    """By all of the package's probes: unseen tokens, loud weights, positions beyond every length."""
    small = made(kind)
    tried = probes(small.model, small.tokens, small.config.to_dict())
    return certify(small.model, derived(kind), tried)


def found(certificate: Certificate) -> Found:
    """How many blocks there are of each stem, group and size."""
    return Counter((b.stem, b.kind, len(b.classes)) for b in certificate.blocks)


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def check(model: nn.Module, example: Any) -> tuple[Derived, Certificate]:
    """Derived on the inputs of ``example(seed)``, certified on others."""
    own = derive(model, [example(0), example(1)])
    return own, certify(model, own, [Probe("unseen", example(2)), Probe("loud", example(3), 4.0)])


def tokens(sequences: int = 2, length: int = 12, seed: int = 1) -> Example:
    """Random token ids, as a model takes them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (sequences, length), generator=generator)
    return {"input_ids": ids, "use_cache": False}


def examples() -> list[Example]:
    """One that is traced, and more for experts that it does not reach."""
    return [tokens(), *(tokens(6, 16, seed) for seed in (2, 3, 4))]
