"""Tiny models of every family, with weights that hide nothing, and changes of basis to try on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from declared import FAMILIES
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from invariance.core.change import Change
from invariance.core.operator import Operator
from invariance.core.space import Space, columns
from invariance.model.canonical import canonicalize
from invariance.model.layout import Layout
from invariance.model.verify import exact_copy
from invariance.testing.tiny import LENGTH, VOCABULARY, redraw, tiny

__all__ = ["LENGTH", "VOCABULARY", "redraw", "tiny"]

fewer = settings(max_examples=settings.default.max_examples // 3)  # for tests that run many models


@st.composite
def tiny_models(
    draw: st.DrawFn, families: Sequence[str] = tuple(FAMILIES), layers: Sequence[int] = (1, 2, 3)
) -> Any:
    """A tiny model of any family: widths, biases, activations, norms, rotary positions and ties all drawn."""
    family = draw(st.sampled_from(list(families)))
    heads = draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([4, 6, 8]))
    eps = draw(st.sampled_from([1e-6, 1e-5, 1e-3]))
    options: dict[str, Any] = {
        "num_attention_heads": heads,
        "hidden_size": heads * head_dim
        if family == "opt"
        else heads * draw(st.sampled_from([4, 6, 8])),
        "num_hidden_layers": draw(st.sampled_from(list(layers))),
        "tie_word_embeddings": draw(st.booleans()),
    }
    width = draw(st.sampled_from([8, 12, 20]))
    act = draw(st.sampled_from(["silu", "gelu", "relu"]))
    if family == "opt":
        options |= {
            "ffn_dim": width,
            "activation_function": act,
            "enable_bias": draw(st.booleans()),
        }
        options["layer_norm_elementwise_affine"] = draw(st.booleans())
        return tiny(family, draw(seeds), **options)
    options |= {
        "intermediate_size": width,
        "hidden_activation" if family == "gemma3_text" else "hidden_act": act,
    }
    options["num_key_value_heads"] = draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": draw(st.sampled_from([100.0, 10000.0])),
    }
    if family == "phi":
        options["layer_norm_eps"] = eps
        options["hidden_size"], head_dim = (
            heads * head_dim,
            head_dim,
        )  # no explicit head_dim in this family
        rope["partial_rotary_factor"] = {4: 0.5, 6: draw(st.sampled_from([1 / 3, 1.0])), 8: 0.25}[
            head_dim
        ]
    else:
        options["rms_norm_eps"] = eps
        if family in ("qwen2", "qwen3", "gemma3_text") or draw(st.booleans()):
            options["head_dim"] = head_dim
        else:  # derived from the width then
            options["hidden_size"] = heads * head_dim
    if family == "llama":
        options |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    if family == "mistral":
        options["sliding_window"] = draw(st.sampled_from([None, 3]))
    if family == "gemma3_text":
        options["final_logit_softcapping"] = draw(st.sampled_from([None, 3.0]))
        rope = {kind: rope for kind in ("sliding_attention", "full_attention")}
        rope["full_attention"] = rope["full_attention"] | {
            "rope_theta": draw(st.sampled_from([50.0, 1e6]))
        }
    if family in ("qwen2", "qwen3"):
        options |= draw(
            st.sampled_from(
                [{}, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}]
            )
        )
    return tiny(family, draw(seeds), rope_parameters=rope, **options)


seeds = st.integers(0, 2**16)


def tokens(seed: int = 0, batch: int = 2, length: int = 7) -> Tensor:
    """Token ids, none of them padding."""
    return torch.randint(
        1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def elements(layout: Layout, names: Iterable[str], seed: int) -> dict[str, Operator]:
    """A random element of the group of each named space."""
    return {name: layout.spaces[name].element(seed) for name in names}


def segments(layout: Layout, by: str) -> dict[str, str]:
    """Point of the stream → the first of its segment; segments are the whole stream, blocks or stages."""
    if by == "stage":
        return {p: p for p in layout.points}
    if by == "block":
        return {p: f"x.{p.split('.')[1]}.0" for p in layout.points}
    return {p: layout.points[0] for p in layout.points}


def share(bases: Mapping[str, Any], heads: Mapping[str, str]) -> dict[str, Any]:
    """The same values, but points of one segment have one object: the first of them has its own."""
    made: dict[str, Any] = {}
    return {name: made.setdefault(heads.get(name, name), value) for name, value in bases.items()}


def rotations(bases: Mapping[str, Operator]) -> dict[str, Change]:
    """A rotation for each basis; one object where the basis is one object."""
    made: dict[int, Change] = {}
    return {name: made.setdefault(id(A), Change.rotation(A)) for name, A in bases.items()}


def canonical_copy(model: PreTrainedModel, fold: bool, tie: str) -> tuple[PreTrainedModel, Layout]:
    """A model's canonical form in float64, and its layout."""
    twin = exact_copy(model)
    return twin, canonicalize(twin, fold=fold, tie=tie)


def cut(change: Change, k: int, space: Space | None = None, pairs: int | None = None) -> Change:
    """The slice that keeps a rotation's leading k directions; of a rotary space the leading pairs, as many as fit.

    Or as many pairs as are named, and of the dims that positions spare what is left of k.
    """
    kept = torch.arange(k)
    if space is not None and space.rotary:
        n = min(space.rotary // 2, k // 2) if pairs is None else pairs
        kept = columns(space.rotary, n, k - 2 * n)
    return change.columns(kept)


def cuttable(layout: Layout, name: str) -> bool:
    """Whether a space can be made narrower: not under a norm, nor where one frequency pair is all that it has."""
    space = layout.spaces[name]
    return not space.normed and space.dim > (2 if space.rotary else 1)


def widths(layout: Layout, names: Iterable[str], data: st.DataObject) -> dict[str, int]:
    """A narrower width for each named space that can be cut; of rotary dims, whole pairs stay, one at least."""

    def narrower(space: Space) -> list[int]:
        pairs = space.rotary // 2
        fit = [k for k in range(2, space.dim) if k - 2 * min(pairs, k // 2) <= space.spared]
        return fit if pairs else list(range(1, space.dim))

    return {
        n: data.draw(st.sampled_from(narrower(layout.spaces[n])), label=f"width of {n}")
        for n in names
        if cuttable(layout, n)
    }


def subset(data: st.DataObject, names: Sequence[str], least: int = 0) -> list[str]:
    """Any of the names; hypothesis alone would mostly draw few."""
    kept = data.draw(
        st.lists(st.booleans(), min_size=len(names), max_size=len(names)), label="kept"
    )
    chosen = [n for n, k in zip(names, kept, strict=True) if k]
    return chosen if len(chosen) >= least else list(names)


def stored(model: nn.Module) -> int:
    """How many numbers a model stores, each tied tensor counted once."""
    return sum(p.numel() for p in model.parameters())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
