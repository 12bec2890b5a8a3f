"""What `verify` does with a model whose layout is derived."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .terminal import say

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def verify(
    model: str, config: PretrainedConfig, seed: int, length: int, trust: bool, as_json: bool
) -> None:
    """The certificate of the derived layout on the model's own weights, whole and in float64."""
    import torch

    from ..calibrate.derived import certify_derived, check_memory
    from ..core.errors import CertificateError
    from ..io.layouts import derived_layout
    from ..io.models import load_model
    from ..model.described.weightless import on_meta

    found = derived_layout(config)
    check_memory(sum(p.numel() for p in on_meta(config).parameters()), model)
    vocabulary = config.get_text_config().vocab_size
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (2, length), generator=g)
    proof = certify_derived(load_model(model, trust_remote_code=trust), found, ids, seed)
    certificate, accepted = proof.certificate, proof.accepted
    verdict = "exact" if certificate.passed else "NOT exact"
    told = [
        f"{verdict}: relative logit error {certificate.relative_error:.2e} after random changes of {certificate.spaces} "
        f"derived spaces at once, up to {proof.longest} tokens; the limit is {certificate.tolerance:.0e}.",
        f"Negative controls (one side of one space): the least {certificate.negative_control:.2e}, which must fail.",
        *(f"Dropped: {name} {why}." for name, why in accepted.refuted.items()),
    ]
    if accepted.unproven:
        told.append(
            f"Not proven, since these tokens do not depend on them: {', '.join(accepted.unproven)}."
        )
    say(proof.to_dict(), as_json, "\n".join(told))
    if certificate.failure is not None:
        raise CertificateError(f"{model}: {certificate.failure}.")
