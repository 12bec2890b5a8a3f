"""Whether the declaration of a family holds where the certificate's probe does not reach: far positions, loud signals.

The families that ship are tried in the tests. One that a plugin declares is tried here, on a small model of the config.
"""

from __future__ import annotations

import copy

import torch
from transformers import AutoConfig, PretrainedConfig

from ..core.change import Change
from ..core.errors import CertificateError
from ..model.canonical import canonicalize
from ..model.derive.certify import TOLERANCE, distance, louder, outputs
from ..model.derive.probes import probes
from ..model.families import FAMILIES, SHIPPED, family_of
from ..model.reparametrize import reparametrize
from ..model.tiny import Tiny, shrunk
from ..model.tiny.build import built
from ..model.verify import random_bases

PASSING = ("model_type", "dtype", "torch_dtype", "quantization_config", "transformers_version")


def check_declared(config: PretrainedConfig) -> None:
    """Raises CertificateError where a plugin's declaration computes something else than the family's own code."""
    kind = family_of(config)
    if FAMILIES.get(kind) is SHIPPED.get(kind):  # or not declared at all
        return
    made = _small(kind, config)
    if made is None:
        return
    for probe in probes(made.model, made.tokens, made.config.to_dict()):
        loud = louder(made.model, probe.loud)
        error = distance(outputs(loud, probe.example), outputs(_rotated(loud), probe.example))
        if not error <= TOLERANCE:
            raise CertificateError(
                f"model type '{kind}': its declaration does not hold at {probe.name}: there, a small model of its config "
                f"gives other logits once it is rewritten and rotated, by {error:.1e}. Declare what it computes, or leave "
                "it out."
            )


def _small(kind: str, config: PretrainedConfig) -> Tiny | None:
    """A small model of a config, with random weights; None where none can be built."""
    values = {k: v for k, v in config.to_dict().items() if k not in PASSING and v is not None}
    try:
        made = built(AutoConfig.for_model(kind, **{**values, **shrunk(config)}), seed=0)
    except Exception:  # each type fails in its own way
        return None
    made.config.tie_word_embeddings = False
    return made


@torch.no_grad()
def _rotated(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in canonical form, with a random element of its group on every space."""
    twin = copy.deepcopy(model)
    layout = canonicalize(twin, fold=True)  # type: ignore[arg-type]
    bases = random_bases(layout, seed=1)
    reparametrize(twin, layout, {n: Change.rotation(A) for n, A in bases.items()})  # type: ignore[arg-type]
    return twin
