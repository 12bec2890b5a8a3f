"""The few modules that every supported model is made of once its blocks are rewritten: Norm, branches, Stage, Block."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Attention, Projections
from .layers import Factored, Linear, Norm, factors

__all__ = [
    "Attention",
    "Block",
    "Factored",
    "Linear",
    "Mlp",
    "Norm",
    "Projections",
    "Stage",
    "as_one_of",
    "factors",
]


class Mlp(nn.Module):
    """down(act(up x)), or down(act(gate x) · up x) where there is a gate."""

    def __init__(self, gate: Linear | None, up: Linear, down: Linear, act: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.act = gate, up, down, act

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return self.down(h)


class Stage(nn.Module):
    """x ↦ shortcut(x) + Σ branch(norm(x)): one step of the residual stream. A parallel block has one, of two branches.

    Where there is a norm ``post``, what the branch gives passes it before it is added.

    ``shortcut`` carries x from this stage's basis to the next one's: a matrix (source width, target width), or, where
    it is ``low_rank``, F (width, rank) in place of I − F Fᵀ. None where x passes as it is. A stage without branches has
    no norm either and passes the stream on.
    """

    def __init__(
        self,
        norm: Norm | None,
        attention: Attention | None,
        mlp: Mlp | None,
        post: Norm | None = None,
    ) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp, self.post = norm, attention, mlp, post
        self.shortcut: nn.Parameter | None = None
        self.low_rank = False

    @property
    def branches(self) -> list[nn.Module]:
        return [b for b in (self.attention, self.mlp) if b is not None]

    def linears(self) -> dict[str, Linear]:
        """The linear layers of its branches, by their names there."""
        found = [(n, m) for b in self.branches for n, m in b.named_children()]
        return {n: m for n, m in found if isinstance(m, Linear)}

    def drop(self, branch: str) -> None:
        """Let a branch go, by its name, and with the last one the norms."""
        setattr(self, branch, None)
        if not self.branches:
            self.norm = self.post = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the branches compute in; the stream itself may be kept in a finer one."""
        return next(self.branches[0].parameters()).dtype

    def carry(self, x: Tensor) -> Tensor:
        """What reaches the end of the stage beside its branches."""
        if self.shortcut is None:
            return x
        M = self.shortcut.to(x.dtype)
        return x - (x @ M) @ M.mT if self.low_rank else x @ M

    def write(self, x: Tensor, **kwargs: Any) -> list[Tensor]:
        """What each branch gives, before any norm behind it."""
        if self.norm is None:
            return []
        h = self.norm(x).to(self.dtype)
        written = [] if self.attention is None else [self.attention(h, **kwargs)[0]]
        return written if self.mlp is None else [*written, self.mlp(h)]

    def land(self, x: Tensor, written: list[Tensor]) -> Tensor:
        """The stream behind the stage, from the stream before it and what its branches give."""
        y = self.carry(x)
        for out in written:
            y = y + (out if self.post is None else self.post(out))
        return y

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.land(x, self.write(x, **kwargs))


class Block(GradientCheckpointingLayer):
    """The stages of one decoder layer, behind the signature that transformers calls a layer with."""

    def __init__(self, stages: list[Stage]) -> None:
        nn.Module.__init__(self)
        self.stages = nn.ModuleList(stages)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        for stage in self.stages:
            hidden_states = stage(hidden_states, **kwargs)
        return hidden_states


def as_one_of(theirs: nn.Module, ours: Any) -> Any:
    """A class of ours that passes for the class of a family's layer, whose name it has, while it computes as ours.

    Libraries find layers by their class or by its name: to record hidden states and attentions, to place blocks on
    devices, to wrap them.
    """
    kind: Any = type(theirs)
    return _both(kind, ours)


@cache
def _both(theirs: Any, ours: Any) -> Any:
    return type(theirs.__name__, (ours, theirs), {"__module__": ours.__module__})
