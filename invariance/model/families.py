"""The families that are known, each a declaration of where its parts lie. The only file that names models."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from ..core.errors import InputError
from .architecture import Architecture, Attention, Mlp, Rms, Stage

LLAMA = Architecture(
    embed=("model.embed_tokens",),
    blocks="model.layers",
    final_norm="model.norm",
    rotary="model.rotary_emb",
    stages=(
        Stage("input_layernorm", attention=Attention("self_attn")),
        Stage(
            "post_attention_layernorm",
            mlp=Mlp("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
        ),
    ),
    alternatives={"mistral": {"sliding_window": None}},
)

QWEN3 = replace(
    LLAMA,
    stages=(
        Stage(
            "input_layernorm", attention=Attention("self_attn", q_norm="q_norm", k_norm="k_norm")
        ),
        LLAMA.stages[1],
    ),
    alternatives={},
)

GEMMA3 = Architecture(
    embed=("model.embed_tokens",),
    blocks="model.layers",
    final_norm="model.norm",
    rotary="model.rotary_emb",
    rms=Rms(eps="eps", offset=1.0),
    scaled=True,
    stages=(
        Stage(
            "input_layernorm",
            attention=Attention("self_attn", q_norm="q_norm", k_norm="k_norm"),
            post="post_attention_layernorm",
        ),
        Stage(
            "pre_feedforward_layernorm",
            mlp=Mlp("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
            post="post_feedforward_layernorm",
        ),
    ),
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
    heads_fill=True,
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

FAMILIES: dict[str, Architecture] = {
    **{"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": QWEN3},
    **{"gemma3_text": GEMMA3, "opt": OPT, "phi": PHI},
}
"""Model type, as a checkpoint's config.json has it → its declaration."""
SHIPPED = dict(FAMILIES)  # without those that plugins declare


EXPERTS = "its MLPs are experts behind a router"
WHOLE_NORMS = "its attention norms the queries of all heads together (q/k-norm), so heads are no directions of their own"
NO_PRE_NORM = "its branches read the stream itself, with a norm behind them alone"

REASONS: dict[str, str] = {
    **dict.fromkeys(("qwen3_moe", "mixtral"), EXPERTS),
    "olmoe": f"{WHOLE_NORMS}, and {EXPERTS}",
    **dict.fromkeys(("olmo2", "olmo3"), f"{WHOLE_NORMS}, and {NO_PRE_NORM}"),
    "exaone4": NO_PRE_NORM,
    "hunyuan_v1_dense": "its attention norms queries and keys behind rotary positions",
    "gemma2": "its attention caps its scores (softcap), which torch's attention functions do not",
    "gemma3": "it reads images too; its text part alone is of the type 'gemma3_text'",
}
"""Model types that are not declared because of what they compute, and what that is."""


def family_of(config: PretrainedConfig) -> str:
    """The model type of a config; of one that says what was done to its model, that of the model's family."""
    kind: str = config.model_type if config.model_type != "invariance" else config.form.family
    return kind


def check_dense(config: PretrainedConfig) -> None:
    """Raises InputError for a model of ours, which is no model to begin with."""
    if config.model_type == "invariance":
        raise InputError(
            "the model is sliced already, in a form that no stock config holds. Start from the original model, "
            "with all steps in one recipe."
        )


def architecture(config: PretrainedConfig) -> Architecture:
    """The declaration of a config's family. Raises InputError for a family that is not known."""
    kind = family_of(config)
    if kind not in FAMILIES:
        raise InputError(
            f"model type '{kind}' is not a known family, so its symmetries cannot be trusted"
            f"{f': {REASONS[kind]}' if kind in REASONS else ''}; known: {', '.join(sorted(FAMILIES))}. "
            "Declare it in families.py (docs/add-a-family.md)."
        )
    return FAMILIES[kind]


LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""How configs call the most tokens that a model takes."""


def positions(config: PretrainedConfig) -> int | None:
    """The most tokens that a model takes; None where rotary positions set no limit. Of a type that is not declared, as
    many as its config names."""
    if family_of(config) not in FAMILIES:
        text = config.get_text_config()
        found = (getattr(text, key, None) for key in LENGTHS)
        return next((n for n in found if isinstance(n, int)), None)
    return None if architecture(config).rotary else config.max_position_embeddings


def check_positions(config: PretrainedConfig, tokens: int, where: str) -> None:
    """Raises InputError when sequences of so many tokens are longer than a model's positions."""
    limit = positions(config)
    if limit is not None and tokens > limit:
        raise InputError(
            f"{where}: sequences of {tokens} tokens, and the model has {limit} positions. "
            f"Ask for {limit} tokens or fewer."
        )
