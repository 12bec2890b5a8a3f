"""A stream under LayerNorms made one under norms that subtract no mean: what writes it gets a mean of zero."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from ...core.errors import InputError
from ..derive.certify import TOLERANCE, distance, outputs
from ..derive.trace import Example
from ..described.description import Description, FlatAxis
from ..described.pattern import RIGID, expand
from ..described.weightless import stored
from .norms import NormOver
from .positions import narrowings
from .renorm import norms_of


def without_means(
    model: PreTrainedModel, description: Description, space: str, example: Example
) -> None:
    """In place; any orthogonal basis of the space leaves the outputs unchanged then.

    With P = I − 11ᵀ/d, LN(x) = RMS(Px). Every writer W of the stream becomes PW, so x is Px everywhere. Raises InputError
    where something else than a norm sees the mean.
    """
    flat, named = description.flat(), stored(model)
    width = flat.spaces[space].width
    before = outputs(model, example)
    some = {space: np.arange(width - 1)}  # so that all that carries the space is found
    norms = norms_of(model, flat, narrowings(description, model, some), some, example)
    with torch.no_grad():
        for a in flat.carrying(space):
            owner = a.parameter.rpartition(".")[0]
            if owner not in norms and any(p.writes for p in a.axis.points) and _whole(a, space):
                W = named[a.parameter]
                W.sub_(W.mean(a.axis.dims[-1], keepdim=True))
    for name, (norm, _) in norms.items():
        if norm.centred:
            module = model.get_submodule(name)
            own = dict(module.named_parameters(recurse=False))
            told = next(
                (flat.gains[f"{name}.{k}"] for k in own if f"{name}.{k}" in flat.gains), None
            )
            offset = 0.0 if told is None else told.offset
            gain = norm.gain - offset if own else None
            bias = norm.bias if len(own) > 1 else None
            owner, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(owner),
                leaf,
                NormOver(width, False, norm.eps, gain, bias, offset),
            )
    error = distance(before, outputs(model, example))
    if not error <= TOLERANCE:
        raise InputError(
            f"cut: without the mean of its stream this model's outputs move by {error:.1e}: something beside its LayerNorms sees "
            "the mean. Cut other spaces."
        )


def _whole(a: FlatAxis, space: str) -> bool:
    """Whether a space lies along all of an axis."""
    return all(s != RIGID and a.space(s) == space for s, _ in expand(a.axis.labels[0]))
