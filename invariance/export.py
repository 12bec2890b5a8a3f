"""A sliced model as an ordinary, smaller checkpoint of its family, wherever one basis and uniform widths allow it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .errors import InvarianceError
from .layout import KINDS, Layout, label
from .modules import Norm
from .verify import logits, relative_error, tolerance


def stock(
    model: PreTrainedModel, layout: Layout, dense: Layout, original: PretrainedConfig
) -> tuple[PreTrainedModel | None, str]:
    """The model under a config of plain transformers, or None and the reason why there is none.

    ``layout`` is that of the canonical form before it was changed, ``dense`` that of the model as it came. With one
    residual basis of width k, RMS over k becomes RMS over d by gains √(d/k) and eps·d/k. Raises InvarianceError when
    the result computes anything else.
    """
    now = label(model)
    config, why = _config(layout, now, dense.centred, original)
    if config is None:
        return None, why
    weights = _weights(model, layout, now)
    expected = {n: tuple(p.shape) for n, p in layout.architecture.skeleton(config).named_parameters()}
    found = {n: tuple(t.shape) for n, t in weights.items()}
    if found != expected:
        odd = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        return (
            None,
            f"a stock '{config.model_type}' has another '{odd[0]}' ({expected.get(odd[0])}, not {found.get(odd[0])})",
        )
    made = AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device).eval()
    made.load_state_dict(weights, strict=False)
    made.generation_config = copy.deepcopy(model.generation_config)
    ids = torch.arange(32, device=model.device).remainder(config.vocab_size)[None]
    error = relative_error(logits(model, ids), logits(made, ids))
    if not error <= tolerance(made.dtype, layout.depth):
        raise InvarianceError(f"the stock checkpoint's logits differ from the sliced model's by {error:.1e}")
    return made, ""


def _config(
    layout: Layout, now: Layout, centred: bool, original: PretrainedConfig
) -> tuple[PretrainedConfig | None, str]:
    """A config of the family, or of one that holds the same function, with the widths that the model has now."""
    widths: dict[str, int] = {}
    for kind in KINDS:
        found = {s.dim for s in now.spaces.values() if s.kind == kind}
        if len(found) > 1:
            return None, f"{kind} widths differ from layer to layer ({min(found)} to {max(found)})"
        widths[kind] = found.pop()
    if now.shortcuts:
        return None, f"{len(now.shortcuts)} stages carry a shortcut between two bases of the residual stream"
    if layout.folded and centred:
        return None, "a rotated stream under LayerNorm needs norms that subtract no mean"
    if layout.folded and now.tied:
        return (
            None,
            "the tied head reads the table through a k×k matrix; `tie: untie` makes a stock checkpoint",
        )
    if widths["vo"] != widths["qk"]:
        return (
            None,
            f"value heads have {widths['vo']} dims and query/key heads {widths['qk']}; a stock config has one head_dim",
        )
    d, k = layout.spaces[layout.points[0]].dim, widths["residual"]
    values = original.to_dict()
    for key in ("architectures", "quantization_config", "model_type"):
        values.pop(key, None)
    values |= {key: widths[kind] for kind, key in layout.architecture.widths}
    values["head_dim"] = widths["vo"]
    values["tie_word_embeddings"] = now.tied
    if layout.folded:
        values["rms_norm_eps"] = original.rms_norm_eps * d / k
    reasons = []
    for kind, extra in {original.model_type: {}, **layout.architecture.alternatives}.items():
        try:
            return AutoConfig.for_model(kind, **{**values, **extra}), ""
        except Exception as e:  # each config class refuses in its own way
            reasons.append(f"'{kind}': {' '.join(str(e).split())}")
    return None, "; ".join(reasons)


def _weights(model: PreTrainedModel, layout: Layout, now: Layout) -> dict[str, Tensor]:
    """The model's weights under the family's own names."""
    arch = layout.architecture
    names: dict[str, str] = {}
    for edge in layout.edges:
        i, s = int(edge.source.split(".")[1]), int(edge.source.split(".")[2])
        names |= arch.origin(i, s)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias"):
            weights[f"{names.get(path, path)}.{leaf}"] = parameter.detach()
    norms = {f"{e.stage}.norm": names[f"{e.stage}.norm"] for e in layout.edges} | {
        arch.final_norm: arch.final_norm
    }
    for path, theirs in norms.items():
        norm = model.get_submodule(path)
        assert isinstance(norm, Norm)
        weights.pop(f"{theirs}.bias", None)
        k = now.spaces[layout.points[-1]].dim
        like = next(model.get_submodule(layout.edges[0].stage).parameters())
        gain = (
            norm.gain
            if norm.gain is not None
            else torch.full((k,), (norm.d / k) ** 0.5, dtype=like.dtype, device=like.device)
        )
        weights[f"{theirs}.weight"] = gain.detach()
        if norm.bias is not None:
            weights[f"{theirs}.bias"] = norm.bias.detach()
    return weights
