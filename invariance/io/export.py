"""A sliced model as an ordinary, smaller checkpoint of its family, wherever one basis and uniform widths allow it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..core.errors import InvarianceError
from ..core.kind import KINDS
from ..model.labels import label
from ..model.layout import Layout
from ..model.modules import Norm
from ..model.reparametrize import attention_of
from ..model.verify import logits, relative_error, tolerance
from .clients import ALTERNATIVES, OLDER, add_older_keys


def stock(
    model: PreTrainedModel, layout: Layout, dense: Layout, original: PretrainedConfig
) -> tuple[PreTrainedModel | None, str]:
    """The model under a config of plain transformers, or None and the reason why there is none.

    ``layout`` is that of the canonical form before it was changed, ``dense`` that of the model as it came. With one
    residual basis of width k, RMS over k becomes RMS over d by gains √(d/k) and eps·d/k; what is normed elsewhere, by
    the same eps, is √(d/k) times as large then. Raises InvarianceError when
    the result computes anything else: give it the model in float64, before the one cast.
    """
    now = label(model)
    widths = layout.widths(now)
    pairs = [attention_of(model, now, name).pairs for name in now.select(["qk"])]
    chosen = next((p[0] for p in pairs if p is not None), None)
    mixed = chosen is not None and not all(
        p is not None and bool((p == chosen).all()) for p in pairs
    )
    biases = len(now.added_biases(layout))
    why = obstacle(layout, widths, len(now.shortcuts), dense.centred, biases, mixed)
    if why is not None:
        return None, why
    rope: dict[str, Any] = {}
    if chosen is not None:
        rope, why = longrope(model, now, original, chosen)
        if why:
            return None, why
    config, why = stock_config(layout, widths, original, rope)
    if config is None:
        return None, why
    like = next(model.parameters())
    renamed = Renaming.of(layout, widths).tensors(model)
    weights = {n: t.to(like.device, like.dtype) for n, t in renamed.items()}
    expected = {
        n: tuple(p.shape) for n, p in layout.architecture.skeleton(config).named_parameters()
    }
    found = {n: tuple(t.shape) for n, t in weights.items()}
    if found != expected:
        odd = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        return (
            None,
            f"a stock '{config.model_type}' has another '{odd[0]}' ({expected.get(odd[0])}, not {found.get(odd[0])})",
        )
    with no_init_weights():  # random ones would be drawn for longer than all else here takes
        made = AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device).eval()
    made.load_state_dict(weights, strict=False, assign=True)
    made.tie_weights()
    made.generation_config = copy.deepcopy(model.generation_config)
    add_older_keys(made.config)
    ids = torch.arange(32, device=model.device).remainder(config.vocab_size)[None]
    error = relative_error(logits(model, ids), logits(made, ids))
    if not error <= tolerance(torch.float32, layout.depth):  # in which the families' norms compute
        raise InvarianceError(
            f"the stock checkpoint's logits differ from the sliced model's by {error:.1e}"
        )
    return made, ""


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The weights to a dtype. Buffers keep float32 at least: rotary frequencies, as transformers loads them."""
    for parameter in model.parameters():
        if parameter.dtype != dtype:  # else scales of a quantised one would change theirs
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(torch.promote_types(dtype, torch.float32)))


def obstacle(
    layout: Layout,
    widths: Mapping[str, int],
    shortcuts: int,
    centred: bool,
    biases: int = 0,
    mixed_pairs: bool = False,
) -> str | None:
    """Why no stock config could hold a model of these widths, whatever its weights; None where one could.

    ``layout`` is that of the canonical form, ``centred`` whether the original's norms subtract the mean, ``biases``
    whether readers got biases that they had not, ``mixed_pairs`` whether heads or layers keep different frequency pairs.
    """
    blocks = layout.blocks(widths)
    for branch, space in layout.branches.items():
        block = layout.spaces[space].block
        if not layout.width(space, widths) and block in blocks:
            return f"block {block} has lost its {branch.rpartition('.')[2]} and not all else"
    if not blocks:
        return "no block is left"
    if split := layout.factored(widths):
        return f"{len(split)} matrices are stored as two factors each"
    for kind in KINDS:
        found = _widths(layout, widths, kind, blocks)
        if len(found) > 1:
            return f"{kind} widths differ from layer to layer ({min(found)} to {max(found)})"
    if shortcuts:
        return f"two bases of the residual stream meet, at {shortcuts} of its edges, in a shortcut"
    if biases:
        return "what is gone is made up for by biases, which this family's linear layers have not"
    if layout.folded and centred:
        return "a rotated stream under LayerNorm needs norms that subtract no mean"
    if layout.folded and layout.tied:
        return "the tied head reads the table through a k×k matrix; `tie: untie` makes a stock checkpoint"
    each = _by_kind(layout, widths)
    if each["vo"] != each["qk"]:
        return f"value heads have {each['vo']} dims and query/key heads {each['qk']}; a stock config has one head_dim"
    if mixed_pairs:
        return "heads or layers keep different frequency pairs; one choice for the whole model makes a stock checkpoint"
    return None


def longrope(
    model: PreTrainedModel, now: Layout, original: PretrainedConfig, chosen: Int[Tensor, " n"]
) -> tuple[dict[str, Any], str]:
    """The rope_parameters under which plain transformers turns pairs by the frequencies kept, or why there are none.

    It computes 1 / (s_i θ^(2i/k)) in float32 for pair i of heads of k dims, with one list of s up to a length and
    another beyond; both are the same here. Rounding of s decides on the last bits of a frequency, which long positions
    multiply, so of its neighbours the one is taken that comes closest.
    """
    if why := _rope_obstacle(now, original):
        return {}, why
    theta, rotary = (
        original.rope_parameters["rope_theta"],
        model.get_submodule(str(now.architecture.rotary)),
    )
    kept = rotary.inv_freq.float().cpu()[chosen.cpu()]  # type: ignore[operator, union-attr, index]
    power = theta ** (torch.arange(0, 2 * len(kept), 2).float() / (2 * len(kept)))
    s = (1 / (kept.double() * power.double())).float()[:, None] * (
        1 + torch.arange(-8, 9) * 2.0**-24
    )
    best = (1.0 / (s * power[:, None]) - kept[:, None]).abs().argmin(1, keepdim=True)
    factors = s.gather(1, best)[:, 0].tolist()
    return _rope_parameters(original, factors, float(rotary.attention_scaling)), ""  # type: ignore[arg-type]


def _rope_obstacle(layout: Layout, original: PretrainedConfig) -> str:
    """Why a stock config cannot say which frequency pairs were chosen; empty where it can."""
    kind = original.rope_parameters["rope_type"]
    if kind in ("dynamic", "longrope"):
        return f"pairs were chosen, and frequencies of the type '{kind}' change with the length"
    if any(space.rotary and space.spared for space in layout.spaces.values()):
        return "pairs were chosen, and `longrope` factors speak of all dims of a head, not of a part of them"
    return ""


def config_obstacle(
    layout: Layout, widths: Mapping[str, int], original: PretrainedConfig, chosen: bool
) -> str | None:
    """Why no config holds widths that ``obstacle`` lets pass, with ``chosen`` frequency pairs or without; None where
    one does."""
    rope: dict[str, Any] = {}
    if chosen:
        if why := _rope_obstacle(layout, original):
            return why
        rope = _rope_parameters(original, [1.0] * (_by_kind(layout, widths)["qk"] // 2), 1.0)
    config, why = stock_config(layout, widths, original, rope)
    return why if config is None else None


def _rope_parameters(
    original: PretrainedConfig, factors: list[float], scaling: float
) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": original.rope_parameters["rope_theta"],
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": scaling,
        "original_max_position_embeddings": original.max_position_embeddings,
    }


def _by_kind(layout: Layout, widths: Mapping[str, int]) -> dict[str, int]:
    blocks = layout.blocks(widths)
    return {kind: k for kind in KINDS for k in _widths(layout, widths, kind, blocks)}


def _widths(layout: Layout, widths: Mapping[str, int], kind: str, blocks: list[int]) -> set[int]:
    """The widths that spaces of a kind have in the blocks that are left, and along the whole stream."""
    return {
        layout.width(n, widths)
        for n, s in layout.spaces.items()
        if s.kind == kind and (kind == "residual" or s.block in blocks)
    }


def stock_config(
    layout: Layout, widths: Mapping[str, int], original: PretrainedConfig, rope: Mapping[str, Any]
) -> tuple[PretrainedConfig | None, str]:
    """A config of the family, or of one that holds the same function, with the widths that the model has now."""
    each = _by_kind(layout, widths)
    d, k = layout.spaces[layout.points[0]].dim, each["residual"]
    values = original.to_dict()
    for key in ("architectures", "quantization_config", "model_type", *OLDER):
        values.pop(key, None)
    values |= {key: each[kind] for kind, key in layout.architecture.widths}
    values["head_dim"] = each["vo"]
    group = next(s for s in layout.spaces.values() if s.kind == "heads")
    values["num_attention_heads"] = values["num_attention_heads"] * each["heads"] // group.dim
    if values.get("num_key_value_heads"):
        values["num_key_value_heads"] = each["heads"]
    blocks = layout.blocks(widths)
    values["num_hidden_layers"] = len(blocks)
    if values.get("layer_types"):
        values["layer_types"] = [values["layer_types"][i] for i in blocks]
    if rope:
        values["rope_parameters"] = dict(rope)
    if layout.architecture.heads_fill and values["num_attention_heads"] * each["vo"] != k:
        asked = f"{values['num_attention_heads']} heads of {each['vo']} dims"
        return (
            None,
            f"{asked} do not make up its stream of {k}, as those of '{original.model_type}' must",
        )
    before = _by_kind(layout, {})
    if each["qk"] != before["qk"] and not layout.architecture.scores_by_width:
        return (
            None,
            f"'{original.model_type}' does not divide scores by the root of its heads' width",
        )
    values["tie_word_embeddings"] = layout.tied
    if layout.folded:
        eps = layout.architecture.eps
        if not eps:
            return (
                None,
                f"no entry of a config of '{original.model_type}' holds the eps of its norms",
            )
        values[eps] = getattr(original, eps) * d / k
    reasons = []
    others = ALTERNATIVES.get(original.model_type, {})
    kinds: dict[str, Mapping[str, Any]] = {original.model_type: {}, **others}
    if values["num_attention_heads"] * each["vo"] != k and not _biased(layout):
        kinds = {
            **others,
            original.model_type: {},
        }  # some clients take k / heads for the width of the family's heads
    for kind, extra in kinds.items():
        try:
            return AutoConfig.for_model(kind, **{**values, **extra}), ""
        except Exception as e:  # each config class refuses in its own way
            reasons.append(f"'{kind}': {' '.join(str(e).split())}")
    return None, "; ".join(reasons)


def _biased(layout: Layout) -> bool:
    """Whether some linear layer has a bias, which the alternatives have not."""
    return any(name.endswith(".bias") for name in layout.axes)


@dataclass(frozen=True)
class Renaming:
    """What a stock checkpoint calls the weights of a canonical model, and by what it multiplies them."""

    layout: Layout  # of the canonical form before it was changed
    names: Mapping[str, str]  # a module's path → the family's
    queries: float  # stock attention divides scores by the square root of the width it has now
    narrowed: float  # what a norm over k dims, of eps·d/k, makes smaller than one over d
    width: int  # of the stream now

    @classmethod
    def of(cls, layout: Layout, widths: Mapping[str, int]) -> Renaming:
        arch, stages, blocks = layout.architecture, layout.stages(widths), layout.blocks(widths)
        names: dict[str, str] = {}
        for edge in layout.edges:
            if edge.stage in stages:
                names |= arch.origin(edge.block, edge.number, blocks.index(edge.block))
        before, now = _by_kind(layout, {}), _by_kind(layout, widths)
        queries = (now["qk"] / before["qk"]) ** 0.5
        last = layout.points[-1]
        k = layout.width(last, widths)
        return cls(layout, names, queries, (layout.spaces[last].dim / k) ** 0.5, k)

    @property
    def table(self) -> float:
        """By what the table is multiplied: where the family scales what it looks up by √k, it was √d."""
        return self.narrowed if self.layout.architecture.scaled else 1.0

    def tensors(self, module: nn.Module, under: str = "") -> dict[str, Tensor]:
        """The weights of a module of the canonical model, which lies at the path ``under``."""
        arch, found = self.layout.architecture, dict[str, Tensor]()
        normed = any(space.normed for space in self.layout.spaces.values())
        prefix = f"{under}." if under else ""
        for name, parameter in module.named_parameters(prefix=under):
            path, _, leaf = name.rpartition(".")
            if leaf in ("weight", "bias"):
                value = parameter.detach()
                if path.endswith(".attention.q"):
                    value = value * self.queries
                if normed and path.endswith((".attention.q", ".attention.k")):
                    value = value * self.narrowed  # the norms of heads have that eps too
                if path == arch.embed[0]:
                    value = value * self.table if arch.scaled else value
                found[f"{self.names.get(path, path)}.{leaf}"] = value
        for name, norm in module.named_modules():
            if isinstance(norm, Norm):
                path = prefix + name if name else under
                theirs = self.names.get(path, path)
                found.pop(f"{theirs}.bias", None)
                found |= {f"{theirs}.{leaf}": v for leaf, v in self._norm(norm).items()}
        return found

    def _norm(self, norm: Norm) -> dict[str, Tensor]:
        arch, found = self.layout.architecture, dict[str, Tensor]()
        if norm.gain is not None:
            factor = (norm.d / len(norm.gain)) ** 0.5
            found["weight"] = (norm.offset + norm.gain.detach()) * factor - arch.rms.offset
        elif self.layout.folded:
            gain = self.narrowed - arch.rms.offset
            found["weight"] = torch.full((self.width,), gain, dtype=torch.float64)
        if norm.bias is not None:
            found["bias"] = norm.bias.detach()
        return found
