"""What slices mean, computed by a dense model: x ↦ x E Dᵀ at each space."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from transformers import PreTrainedModel

from invariance.core.change import Change
from invariance.model.layout import Layout


def project(model: PreTrainedModel, layout: Layout, changes: Mapping[str, Change]) -> None:
    """Make a dense model compute what slices mean: x ↦ x E Dᵀ at each space, no weight touched."""

    def signal(x: Tensor, space: str) -> Tensor:
        if space not in changes:
            return x
        E, D = changes[space].encode.matrix(), changes[space].decode.matrix()
        if layout.spaces[space].kind == "heads":
            E, D = (
                torch.kron(X, torch.eye(x.shape[-1] // X.shape[1], dtype=X.dtype)) for X in (E, D)
            )
        P = einsum(E, D, "c d k, c e k -> c d e")
        heads = x.shape[-1] // P.shape[-1]
        P = repeat(P, "c d e -> (c r) d e", r=heads // P.shape[0])
        x = rearrange(x, "... (h d) -> ... h d", h=heads)
        return rearrange(einsum(x, P, "... h d, h d e -> ... h e"), "... h e -> ... (h e)")

    def before(module: nn.Module, space: str) -> None:
        module.register_forward_pre_hook(lambda _, args: (signal(args[0], space), *args[1:]))

    for edge in layout.edges:
        stage, i = model.get_submodule(edge.stage), edge.source.split(".")[1]
        before(stage, edge.source)
        if stage.attention is not None:
            before(stage.attention.out, f"vo.{i}")
            before(stage.attention.out, f"heads.{i}")
            stage.attention.k.register_forward_hook(
                lambda _, args, k, space=f"qk.{i}": signal(k, space)
            )
        if stage.mlp is not None:
            before(stage.mlp.down, f"mlp.{i}")
        if stage.post is not None:
            before(stage.post, edge.target)
    final = model.get_submodule(layout.architecture.final_norm)
    before(final, layout.points[-1])
    if layout.tied:  # the head reads the table as the first point has it
        final.register_forward_hook(lambda _, args, x: signal(x, layout.points[0]))
