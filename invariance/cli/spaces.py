"""The commands that look at a model: its spaces, and the certificate that they are what they are said to be."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .terminal import Device, Json, ModelArgument, Trust, device_named, library, out, progress, say


def inspect(
    model: ModelArgument,
    layout: Annotated[
        bool,
        typer.Option(
            "--layout", help="Print the layout that is derived of its config, of any type."
        ),
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    plugin: list[str] = [],
) -> None:
    """List a model's spaces, groups and widths, its parameters, FLOPs and KV bytes. Reads no weights.

    With `--layout`, or for a type that is not declared, they are derived from one pass of a few layers at full width.
    """
    from ..report.plans import derived_spaces, inspection
    from .answers import Question, answer

    def find() -> dict[str, Any]:
        with library(plugin):
            from ..run.planned import inspected

            return inspected(model, layout, trust_remote_code=trust_remote_code)

    asked = Question("inspect", None, [model, *(["--layout"] if layout else [])])
    document = find() if plugin or trust_remote_code else answer(asked, find)
    if "layout" not in document:
        say(document, as_json, *([] if as_json else inspection(document)))
    elif layout and not as_json:
        out.print(document["layout"], markup=False, highlight=False, soft_wrap=True)
    else:
        say(document, as_json, *([] if as_json else [derived_spaces(document)]))


def verify(
    model: ModelArgument,
    seed: Annotated[
        int, typer.Option(help="Of the random group elements.", min=0, max=2**32 - 1)
    ] = 0,
    tokens: Annotated[int, typer.Option(help="How many probe tokens.", min=2, max=4096)] = 64,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Certify that random group elements on every space at once leave a model's logits unchanged.

    In float64, against the untouched model, within a tolerance that follows from dtype and depth; half of each
    change, applied to the writers alone, must move the logits. Exit status 1 if not. Of a type that is not declared, the
    layout is derived first, and each of its spaces has a control of its own.
    """
    import torch

    from ..calibrate.certificate import certify_random
    from ..core.errors import CertificateError
    from ..io.models import load_config
    from ..io.source import open_source
    from ..model.families import check_positions, declared
    from .derived import verify as verify_derived

    config = load_config(model, trust_remote_code=trust_remote_code)
    if not declared(config):
        verify_derived(model, config, seed, tokens, trust_remote_code, as_json)
        return
    check_positions(config, tokens, "--tokens")
    source = open_source(model, trust_remote_code=trust_remote_code)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (1, tokens), generator=g)
    where = device_named(device)
    certificate = certify_random(source, ids, seed=seed, device=where, progress=progress)
    verdict = "exact" if certificate.passed else "NOT exact"
    say(
        certificate.to_dict(),
        as_json,
        f"{verdict}: relative logit error {certificate.relative_error:.2e} after random changes of {certificate.spaces} "
        f"spaces; rounding explains {certificate.tolerance:.2e}.\nNegative control (writers only): "
        f"{certificate.negative_control:.2e}, which must fail.",
    )
    if certificate.failure is not None:
        raise CertificateError(f"{model}: {certificate.failure}.")
