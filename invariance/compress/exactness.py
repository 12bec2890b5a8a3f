"""Whether the bases of a run are exact: one certificate for all of them, on probe tokens, before anything is written."""

from __future__ import annotations

import json
from functools import partial
from itertools import chain

import torch
from jaxtyping import Int64
from torch import Tensor

from ..calibrate.certificate import Form, Rotations, certify
from ..core.errors import CertificateError
from ..io.data import Tokens
from ..io.memo import digest
from ..model.verify import Certificate
from .bases import Bases
from .calibration import timed

PROBE_TOKENS = 64


def probe(vocabulary: int, seed: int, tokens: Tokens | None) -> Int64[Tensor, "B T"]:
    """The token ids that a certificate compares logits on: the first that there are, else random ones."""
    if tokens is not None:
        return tokens.ids[:1, :PROBE_TOKENS]
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (2, PROBE_TOKENS // 2), generator=g)


def certify_bases(bases: Bases) -> Certificate:
    """The certificate of all bases at once, on probe tokens that need no text. Raises CertificateError."""
    calibration, plan, memo, shared = bases.calibration, bases.plan, bases.memo, bases.shared
    source, recipe = calibration.source, plan.recipe
    ids = probe(source.config.vocab_size, recipe.seed, calibration.tokens)
    with timed(calibration.seconds, "verify"):
        asked = json.dumps([shared, plan.fold, recipe.tie, recipe.seed])
        weights = memo.weights(source)
        first = dict.fromkeys(shared.values())
        every = (t for n in first for t in bases[n].tensors)
        rotation = digest(f"{weights} {asked}", chain(every, [ids]))
        make = partial(
            certify,
            source,
            Rotations(bases, shared),
            ids,
            Form(plan.fold, recipe.tie),
            seed=recipe.seed,
            device=calibration.device,
            progress=calibration.progress,
        )
        certificate = memo.once(("certificate", rotation), make)
    if not certificate.passed:
        raise CertificateError(f"{certificate.failure}. Nothing is written.")
    return certificate
