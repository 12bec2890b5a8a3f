"""The grammar in which a model family is declared, and the rewriting of a family's model into it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..core.errors import InputError
from . import modules
from .vocabulary import tie


@dataclass(frozen=True)
class Attention:
    """Where the four projections of an attention lie, relative to ``module`` of the block.

    ``q_norm`` and ``k_norm`` are norms of each head's queries and keys, behind the projection and before positions turn
    them.
    """

    module: str
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    out: str = "o_proj"
    q_norm: str | None = None
    k_norm: str | None = None

    def names(self) -> dict[str, str]:
        """Our name of each weight → the family's, relative to the block."""
        found = {ours: getattr(self, ours) for ours in ("q", "k", "v", "out", "q_norm", "k_norm")}
        return {ours: _join(self.module, theirs) for ours, theirs in found.items() if theirs}


@dataclass(frozen=True)
class Mlp:
    """Where the projections of an MLP lie; ``module`` is empty where they lie on the block itself."""

    module: str
    up: str
    down: str
    gate: str | None = None
    act: str = "act_fn"

    def names(self) -> dict[str, str]:
        found = {"gate": self.gate, "up": self.up, "down": self.down}
        return {ours: _join(self.module, theirs) for ours, theirs in found.items() if theirs}


@dataclass(frozen=True)
class Stage:
    """One norm and the branches that read it and add to the residual stream.

    ``post`` is a norm that what the branch gives passes before it is added; such a stage has one branch.
    """

    norm: str
    attention: Attention | None = None
    mlp: Mlp | None = None
    post: str | None = None

    def __post_init__(self) -> None:
        if self.post is not None and self.attention is not None and self.mlp is not None:
            raise ValueError(
                f"a stage with the post-norm '{self.post}' has two branches; give each its own"
            )

    def names(self) -> dict[str, str]:
        """Our name of each weight's module, relative to the stage → the family's, relative to the block."""
        found = {"norm": self.norm} | ({} if self.post is None else {"post": self.post})
        for kind, branch in (("attention", self.attention), ("mlp", self.mlp)):
            if branch is not None:
                found |= {f"{kind}.{ours}": theirs for ours, theirs in branch.names().items()}
        return found


@dataclass(frozen=True)
class Rms:
    """How a family's RMSNorms are written down: under which name they keep eps, and what their gain is beyond the
    weight. A gain of 1 + w is multiplied in before the signal is rounded to its dtype."""

    eps: str = "variance_epsilon"
    offset: float = 0.0


@dataclass(frozen=True)
class Architecture:
    """A model family: where its parts lie. Shapes, biases and norm kinds are read off the modules themselves.

    ``scaled``: the embedding multiplies what it looks up by the root of the stream's width.
    """

    embed: tuple[str, ...]
    blocks: str
    final_norm: str
    stages: tuple[Stage, ...]
    head: str = "lm_head"
    rotary: str | None = None
    rms: Rms = Rms()
    scaled: bool = False
    heads_fill: bool = False
    """Whether heads are as wide as the stream divided by their number, whatever the config says."""
    widths: tuple[tuple[str, str], ...] = (
        ("residual", "hidden_size"),
        ("mlp", "intermediate_size"),
    )
    scores_by_width: bool = True
    """Whether attention divides scores by the root of its heads' width, and not by a number of the config's own."""
    eps: str = "rms_norm_eps"
    """The config key that holds the eps of RMSNorms; empty where none does, or where norms are LayerNorms."""

    @property
    def post_normed(self) -> bool:
        """Whether norms with gains stand between branches and the stream."""
        return any(stage.post is not None for stage in self.stages)

    def skeleton(self, config: PretrainedConfig) -> PreTrainedModel:
        """The family's own model on the meta device: shapes and no weights. Raises InputError if it cannot be built."""
        config = copy.deepcopy(config)  # an untied head is noted there
        try:
            with torch.device("meta"):
                model = self.build(config)
        except Exception as e:  # each family fails in its own way
            why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            raise InputError(
                f"model type '{config.model_type}': no model can be built of its config.json ({why}). Repair the config."
            ) from None
        empty = [name for name, p in model.named_parameters() if not p.numel()]
        if empty or not len(model.get_submodule(self.blocks)):  # type: ignore[arg-type]
            raise InputError(
                f"model type '{config.model_type}': its config.json describes a model "
                f"{f'whose {empty[0]} is empty' if empty else 'without layers'}. Repair the config."
            )
        return model

    def build(self, config: PretrainedConfig) -> PreTrainedModel:
        """The family's own model, untrained, on the device that torch builds on now."""
        model = AutoModelForCausalLM.from_config(config)
        if config.tie_word_embeddings:  # on the meta device transformers leaves the two apart
            tie(model, self)
        return model

    def origin(self, i: int, s: int, layer: int | None = None) -> dict[str, str]:
        """Our full name of each weight's module in stage s of block i → the family's, in layer i or another."""
        layer = i if layer is None else layer
        return {
            f"{self.blocks}.{i}.stages.{s}.{ours}": f"{self.blocks}.{layer}.{theirs}"
            for ours, theirs in self.stages[s].names().items()
        }

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that holds weights which what was read of a small one does not speak of, or lacks some."""
        kind = model.config.model_type
        known = {*self.embed, self.final_norm, self.head}
        for i in range(len(model.get_submodule(self.blocks))):  # type: ignore[arg-type]
            for s in range(len(self.stages)):
                known |= set(self.origin(i, s).values())
        present = dict(model.named_modules())
        for name in sorted(known):
            if present.get(name) is None:
                raise InputError(
                    f"model type '{kind}': this model has no '{name}', which a small one of its config has. Give the model "
                    "as its family's own code makes it."
                )
        for name, _ in model.named_parameters():
            module = name.rpartition(".")[0]
            if module not in known:
                raise InputError(
                    f"model type '{kind}': this model has a weight '{name}', which a small one of its config has not, so no "
                    "change of basis could be trusted. Give the model as its family's own code makes it."
                )

    def restructure(self, model: PreTrainedModel) -> None:
        """Replace every decoder layer by a Block of the family's own linear layers, and every norm by a Norm.

        In place; the function is the family's to the rounding of its norms. Raises InputError (see ``check``).
        """
        self.check(model)
        blocks = model.get_submodule(self.blocks)
        assert isinstance(blocks, nn.ModuleList)
        for i, layer in enumerate(blocks):
            stages = [self.stage_of(layer, stage, model.config) for stage in self.stages]
            blocks[i] = modules.as_one_of(layer, modules.Block)(stages).train(layer.training)
        model.set_submodule(self.final_norm, self.norm_of(model.get_submodule(self.final_norm)))

    def stage_of(self, layer: nn.Module, stage: Stage, config: PretrainedConfig) -> modules.Stage:
        attention = mlp = None
        if stage.attention is not None:
            found = {
                ours: layer.get_submodule(theirs)
                for ours, theirs in stage.attention.names().items()
            }
            norms = {
                ours: self.norm_of(found.pop(ours))
                for ours in ("q_norm", "k_norm")
                if ours in found
            }
            heads = config.num_attention_heads
            kv = getattr(config, "num_key_value_heads", None) or heads
            origin = layer.get_submodule(stage.attention.module)
            kind = modules.as_one_of(origin, modules.Attention)
            own = modules.Projections(**found)  # type: ignore[arg-type]
            attention = kind(own, origin, heads, kv, **norms)
        if stage.mlp is not None:
            parts = {
                ours: layer.get_submodule(theirs) for ours, theirs in stage.mlp.names().items()
            }
            act = layer.get_submodule(_join(stage.mlp.module, stage.mlp.act))
            mlp = modules.Mlp(parts.get("gate"), parts["up"], parts["down"], act)  # type: ignore[arg-type]
        post = None if stage.post is None else self.norm_of(layer.get_submodule(stage.post))
        made = modules.Stage(self.norm_of(layer.get_submodule(stage.norm)), attention, mlp, post)
        return made.train(layer.training)  # new modules are in training mode, where attention drops

    def norm_of(self, norm: nn.Module) -> modules.Norm:
        """The Norm that does what a family's norm module does."""
        gain: torch.Tensor | None = norm.weight  # type: ignore[assignment]
        if isinstance(norm, nn.LayerNorm):
            return modules.Norm(norm.normalized_shape[0], norm.eps, True, gain, norm.bias)
        assert gain is not None
        eps = float(getattr(norm, self.rms.eps))
        return modules.Norm(gain.shape[0], eps, False, gain, None, self.rms.offset)


def _join(*parts: str) -> str:
    return ".".join(p for p in parts if p)
