"""Where the parts of seven families lie, written down by hand: what is read of their models must be the same."""

from __future__ import annotations

from dataclasses import replace

from invariance.model.architecture import Architecture, Attention, Mlp, Rms, Stage

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
)

NORMED = Attention("self_attn", q_norm="q_norm", k_norm="k_norm")
QWEN3 = replace(LLAMA, stages=(Stage("input_layernorm", attention=NORMED), LLAMA.stages[1]))

GEMMA3 = replace(
    LLAMA,
    rms=Rms(eps="eps", offset=1.0),
    scaled=True,
    scores_by_width=False,
    stages=(
        Stage("input_layernorm", attention=NORMED, post="post_attention_layernorm"),
        replace(
            LLAMA.stages[1],
            norm="pre_feedforward_layernorm",
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
    eps="",
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
    eps="",
)

FAMILIES = {
    **{"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": QWEN3},
    **{"gemma3_text": GEMMA3, "opt": OPT, "phi": PHI},
}
"""Model type → its declaration."""
