"""The families that are known, each a declaration of where its parts lie. The only file that names models."""

from __future__ import annotations

from transformers import PretrainedConfig

from .architecture import Architecture, Attention, Mlp, Stage
from .errors import InputError

LLAMA = Architecture(
    embed=("model.embed_tokens",),
    blocks="model.layers",
    final_norm="model.norm",
    rotary="model.rotary_emb",
    stages=(
        Stage("input_layernorm", attention=Attention("self_attn")),
        Stage("post_attention_layernorm", mlp=Mlp("mlp", gate="gate_proj", up="up_proj", down="down_proj")),
    ),
    alternatives={"mistral": {"sliding_window": None}},
)

OPT = Architecture(
    embed=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    blocks="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    stages=(
        Stage("self_attn_layer_norm", attention=Attention("self_attn", out="out_proj")),
        Stage("final_layer_norm", mlp=Mlp("", up="fc1", down="fc2", act="activation_fn")),
    ),
    widths=(("residual", "hidden_size"), ("mlp", "ffn_dim")),
)

PHI = Architecture(
    embed=("model.embed_tokens",),
    blocks="model.layers",
    final_norm="model.final_layernorm",
    rotary="model.rotary_emb",
    stages=(
        Stage(
            "input_layernorm",
            attention=Attention("self_attn", out="dense"),
            mlp=Mlp("mlp", up="fc1", down="fc2", act="activation_fn"),
        ),
    ),
)

FAMILIES: dict[str, Architecture] = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "opt": OPT, "phi": PHI}
"""Model type, as a checkpoint's config.json has it → its declaration."""


NORMED_HEADS = (
    "its attention norms queries and keys after their projections (q/k-norm), so a change of basis or a cut of them "
    "does not pass through"
)
POST_NORMS = "norms with gains stand behind its branches (post-norm), so the residual stream has no rotations"

REASONS: dict[str, str] = {
    **dict.fromkeys(("qwen3", "qwen3_moe", "hunyuan_v1_dense", "olmoe"), NORMED_HEADS),
    **dict.fromkeys(
        ("gemma3", "gemma3_text", "olmo2", "olmo3", "exaone4"), f"{NORMED_HEADS}, and {POST_NORMS}"
    ),
    "gemma2": POST_NORMS,
}
"""Model types that are not declared because of what they compute, and what that is."""


def architecture(config: PretrainedConfig) -> Architecture:
    """The declaration of a config's family. Raises InputError for a family that is not known."""
    kind = config.model_type
    if kind == "invariance":
        raise InputError(
            "the model is sliced already, in a form that no stock config holds. Start from the original model, "
            "with all steps in one recipe."
        )
    if kind not in FAMILIES:
        raise InputError(
            f"model type '{kind}' is not a known family, so its symmetries cannot be trusted"
            f"{f': {REASONS[kind]}' if kind in REASONS else ''}; known: {', '.join(sorted(FAMILIES))}. "
            "Declare it in families.py (docs/add-a-family.md)."
        )
    return FAMILIES[kind]


def positions(config: PretrainedConfig) -> int | None:
    """The most tokens that a model of a known family takes; None where rotary positions set no limit."""
    return None if architecture(config).rotary else config.max_position_embeddings


def check_positions(config: PretrainedConfig, tokens: int, where: str) -> None:
    """Raises InputError when sequences of so many tokens are longer than a model's positions."""
    limit = positions(config)
    if limit is not None and tokens > limit:
        raise InputError(
            f"{where}: sequences of {tokens} tokens, and the model has {limit} positions. "
            f"Ask for {limit} tokens or fewer."
        )
