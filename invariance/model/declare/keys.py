"""Which entries of a config say how wide a model is: each is changed, and the model built on meta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ...core.errors import InputError
from ..architecture import Architecture
from ..described.weightless import on_meta
from ..tiny.sizes import HEADS, is_number

COUNTS = ("num_attention_heads", "num_hidden_layers")  # which export writes by these names


SAME = 1e-6  # relative

Told = Callable[[PreTrainedModel], float]


def check_counts(config: PretrainedConfig) -> None:
    """Raises InputError for a config that does not say by these names how many heads and layers there are."""
    for key in COUNTS:
        if key not in config.to_dict():
            raise InputError(f"its config has no entry '{key}'")


@dataclass(frozen=True)
class Keys:
    """A small config, and the architecture that was read of its model."""

    config: PretrainedConfig
    arch: Architecture

    def told(self, norm: nn.Module) -> Architecture:
        """The architecture, with what its config's entries say. Raises InputError."""
        widths = [("residual", self._key(self._stream, 2 * HEADS, "its stream is"))]
        if any(stage.mlp for stage in self.arch.stages):
            widths.append(("mlp", self._key(self._channels, 8, "its MLPs are")))
        eps = "" if isinstance(norm, nn.LayerNorm) else self._eps_key()
        return replace(
            self.arch,
            widths=tuple(widths),
            heads_fill=self._heads_fill(),
            scores_by_width=self._scores_by_width(widths[0][1]),
            eps=eps,
        )

    def _linear(self, model: PreTrainedModel, part: str) -> nn.Linear:
        """The first block's linear layer of a name of ours."""
        for s in range(len(self.arch.stages)):
            for ours, theirs in self.arch.origin(0, s).items():
                if ours.endswith(part):
                    found = model.get_submodule(theirs)
                    assert isinstance(found, nn.Linear)
                    return found
        raise InputError(f"its blocks have no '{part}'")

    def _stream(self, model: PreTrainedModel) -> float:
        return self._linear(model, ".attention.q").in_features

    def _channels(self, model: PreTrainedModel) -> float:
        return self._linear(model, ".mlp.up").out_features

    def _inside_heads(self, model: PreTrainedModel) -> float:
        return self._linear(model, ".attention.out").in_features

    def _eps(self, model: PreTrainedModel) -> float:
        return float(getattr(model.get_submodule(self.arch.final_norm), self.arch.rms.eps))

    def _built(self, **change: Any) -> PreTrainedModel | None:
        values = {k: v for k, v in self.config.to_dict().items() if k != "model_type"}
        try:
            return on_meta(AutoConfig.for_model(self.config.model_type, **{**values, **change}))
        except Exception:  # a config that cannot be says so in many ways
            return None

    def _moves(self, key: str, to: float, told: Told) -> bool:
        model = self._built(**{key: to})
        return model is not None and told(model) == to

    def _key(self, told: Told, more: int, what: str) -> str:
        """The entry that says a width."""
        model = self._built()
        now = 0 if model is None else told(model)
        for key, value in self.config.to_dict().items():
            if is_number(value) and value == now and self._moves(key, value + more, told):
                return key
        raise InputError(f"no entry of its config says how wide {what}")

    def _eps_key(self) -> str:
        """The entry that says the eps of norms; '' where none does."""
        values = self.config.to_dict().items()
        kept = (k for k, v in values if isinstance(v, float) and self._moves(k, 2 * v, self._eps))
        return next(kept, "")

    def _heads_fill(self) -> bool:
        """Whether heads are as wide as the stream divided by their number, whatever the config says."""
        model, wider = self._built(), self._built(head_dim=2 * HEADS * HEADS)
        if model is None or wider is None:
            return True
        return self._inside_heads(model) == self._inside_heads(wider)

    def _scaling(self, model: PreTrainedModel) -> float:
        """What scores are multiplied by."""
        home = next(s.attention.module for s in self.arch.stages if s.attention is not None)
        attention: Any = model.get_submodule(f"{self.arch.blocks}.0.{home}")
        return float(attention.scaling)

    def _scores_by_width(self, stream: str) -> bool:
        """Whether scores shrink as heads twice as wide want it."""
        model = self._built()
        if model is None:
            return False
        head = int(self._inside_heads(model)) // self.config.num_attention_heads
        twice = {stream: 2 * getattr(self.config, stream), "head_dim": 2 * head}
        wider = self._built(**twice)
        return (
            wider is not None
            and abs(self._scaling(wider) / self._scaling(model) * 2**0.5 - 1) < SAME
        )
