"""The block walk in its orders: it ends where the model does, and measures what the model's own hooks see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from folders import model_of
from hypothesis import given
from sliced import MEAN, NORMED, RAW, WEIGHTED, close, exact, real, same, taken, tokens
from sliced import data as data
from tiny import tiny, tiny_models
from torch import Tensor, nn
from transformers import PreTrainedModel

from invariance.calibrate import walk
from invariance.calibrate.enter import enter
from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Change
from invariance.model import verify
from invariance.model.labels import label
from invariance.model.layout import Layout
from invariance.model.verify import logits
from invariance.model.working import Whole


def everything(layout: Layout) -> dict[str, frozenset[Statistic]]:
    return {
        n: frozenset({RAW, WEIGHTED, MEAN, *([NORMED] if s.kind == "residual" else [])})
        for n, s in layout.spaces.items()
    }


def measured(
    family: str, batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float64
) -> Moments:
    model, layout = exact(family)
    parts = Whole(model, layout)
    return taken(parts, enter(parts, batches, dtype), everything(layout), dtype)


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_batches_of_any_size_give_the_same_moments(family: str) -> None:
    ids = tokens().ids[:8]
    whole = measured(family, [real(ids)])
    same(measured(family, [real(part) for part in ids.split(3)]), whole)
    halves = [measured(family, [real(half)]) for half in ids.chunk(2)]
    same(halves[0].merge(halves[1]), whole)


@given(model=tiny_models())
def test_the_walk_ends_where_the_model_does(model: PreTrainedModel) -> None:
    """Also where layers differ in what they are called with: full and sliding attention, by turns."""
    twin = verify.exact_copy(model)
    layout = label(twin)
    ids = torch.randint(1, 31, (2, 12), generator=torch.Generator().manual_seed(0))
    parts = Whole(twin, layout)
    batches = enter(parts, [real(ids)], torch.float64)
    walk.oneshot(parts, batches, {}, torch.float64)
    kept: list[Tensor] = []
    last = twin.get_submodule(layout.architecture.final_norm)
    handle = last.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    logits(twin, ids)
    handle.remove()
    assert close(batches[0].x, kept[0])


def test_a_walk_that_gives_every_block_what_the_first_is_given_is_caught() -> None:
    options = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    twin = verify.exact_copy(tiny("qwen2", **options))
    parts = Whole(twin, label(twin))
    batches = enter(parts, [real(torch.arange(1, 13)[None])], torch.float64)
    masks = [c["attention_mask"] for c in batches[0].contexts]
    assert not torch.equal(*(torch.zeros(1) if m is None else m.double() for m in masks))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_padding_is_ignored(family: str, side: str) -> None:
    ids = tokens().ids[:4]
    mask = torch.ones(4, 21, dtype=torch.bool)
    pad = slice(0, 5) if side == "left" else slice(16, 21)
    mask[:, pad] = False
    padded = torch.zeros(4, 21, dtype=torch.long)
    padded[mask] = ids.flatten()
    plain = measured(family, [real(ids)])
    # Rotary angles of shifted positions are float32, so scores err by its rounding.
    same(measured(family, [(padded, mask)]), plain, 1e-6)
    unmasked = measured(family, [real(padded)])
    assert unmasked.known["x.0.0", RAW].count > plain.known["x.0.0", RAW].count  # the control


# --- The walk against the family's own model.


def watched(family: str, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    """The signals of a family's own, untouched model, by hooks; (tokens, width), the stream centred if it must be."""
    model = model_of(family, **options).double()
    found: dict[str, Tensor] = {}
    centred = family in ("opt", "phi")
    names = {
        "gemma3_text": (
            "model.layers",
            "input_layernorm",
            "self_attn.o_proj",
            "pre_feedforward_layernorm",
            "mlp.down_proj",
            "model.norm",
        ),
        "llama": (
            "model.layers",
            "input_layernorm",
            "self_attn.o_proj",
            "post_attention_layernorm",
            "mlp.down_proj",
            "model.norm",
        ),
        "opt": (
            "model.decoder.layers",
            "self_attn_layer_norm",
            "self_attn.out_proj",
            "final_layer_norm",
            "fc2",
            "model.decoder.final_layer_norm",
        ),
        "phi": (
            "model.layers",
            "input_layernorm",
            "self_attn.dense",
            None,
            "mlp.fc2",
            "model.final_layernorm",
        ),
    }[family]
    blocks, first, out, second, down, final = names

    def keep(path: str, name: str, reads: bool = True) -> None:
        def hook(_m: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            x = (args[0] if reads else y).detach().flatten(0, -2)
            found[name] = x - x.mean(-1, keepdim=True) if name.startswith("x.") and centred else x

        model.get_submodule(path).register_forward_hook(hook)

    for i in range(2):
        keep(f"{blocks}.{i}.{first}", f"x.{i}.0")
        keep(f"{blocks}.{i}.{out}", f"vo.{i}")
        keep(f"{blocks}.{i}.{out}", f"heads.{i}")
        keep(f"{blocks}.{i}.self_attn.k_proj", f"qk.{i}", reads=False)
        keep(f"{blocks}.{i}.{down}", f"mlp.{i}")
        if family == "gemma3_text":
            keep(f"{blocks}.{i}.{out}", f"y.{i}.0", reads=False)
            keep(f"{blocks}.{i}.{down}", f"y.{i}.1", reads=False)
        if second:
            keep(f"{blocks}.{i}.{second}", f"x.{i}.1")
    keep(final, "x.2.0")
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return found


def behind(family: str, signals: dict[str, Tensor], name: str) -> Tensor:
    """The stream behind the stage that a space lies in, or where it stands; what the branch gives to a norm behind it."""
    kind, block = name.split(".")[:2]
    if kind == "x":
        return signals[name]
    if family == "gemma3_text":
        return signals[f"y.{block}.{int(kind == 'mlp')}"]
    last = kind == "mlp" or family == "phi"
    return signals[f"x.{int(block) + 1}.0" if last else f"x.{block}.1"]


@pytest.mark.parametrize("family", ["llama", "opt", "phi", "gemma3_text"])
def test_oneshot_moments_are_those_of_the_familys_own_signals(family: str) -> None:
    ids = tokens().ids[:6]
    walked, layout = measured(family, [real(ids)]), exact(family)[1]
    signals = watched(family, ids)
    assert {n for n in signals if not n.startswith("y.")} == layout.spaces.keys()
    for name, space in layout.spaces.items():
        x = signals[name]
        heads = {"vo": 4, "qk": 2}.get(space.kind, 1)
        heads = 4 if family == "opt" and space.kind == "qk" else heads
        by_hand = Moments()
        by_hand.add((name, RAW), x, space.copies, max(heads, space.copies))
        bound = 1e-6  # the family's norms compute in float32
        assert close(walked.known[name, RAW].total, by_hand.known[name, RAW].total, bound), name
        w = 1 / behind(family, signals, name).square().mean(-1, keepdim=True)
        by_hand.add((name, WEIGHTED), x * w.sqrt(), space.copies, max(heads, space.copies))
        assert close(
            walked.known[name, WEIGHTED].mean, by_hand.known[name, WEIGHTED].total / w.sum(), bound
        ), name
        assert not close(walked.known[name, WEIGHTED].mean, by_hand.known[name, RAW].mean, 1e-3), (
            name
        )
        if space.kind == "residual":
            unit = x * torch.rsqrt(
                x.square().mean(-1, keepdim=True) + (1e-5 if family in ("opt", "phi") else 1e-6)
            )
            assert close(walked.second(space, NORMED)[0], unit.T @ unit / len(unit), bound), name


def cut_walk(inner: bool) -> tuple[PreTrainedModel, dict[str, Moments]]:
    """A sequential walk that cuts the stream, and the first MLP if told; what was measured of the spaces it keeps."""
    model, layout = exact("llama")
    seen: dict[str, Moments] = {}

    def decide(name: str, moments: Moments) -> Change | None:
        seen[name] = moments
        space = layout.spaces[name]
        eye = torch.eye(space.dim, dtype=torch.float64)[None]
        k = {"residual": 24, "mlp": 40 if inner and name == "mlp.0" else None}.get(space.kind)
        return None if k is None else Change(eye[..., :k].contiguous(), eye[..., :k].contiguous())

    parts = Whole(model, layout)
    batches = enter(parts, [real(tokens().ids[:6])], torch.float64)
    walk.sequential(parts, batches, torch.float64, walk.Cutting(everything(layout), decide))
    return model, seen


def test_sequential_moments_are_those_behind_the_cuts_before_them() -> None:
    model, seen = cut_walk(inner=True)
    found: dict[str, Tensor] = {}
    for i in range(2):
        stages = model.model.layers[i].stages  # type: ignore[union-attr]
        for name, module in (
            (f"vo.{i}", stages[0].attention.out),
            (f"mlp.{i}", stages[1].mlp.down),
        ):
            module.register_forward_hook(
                lambda _m, a, _y, name=name: found.__setitem__(name, a[0].flatten(0, -2))
            )
    logits(model, tokens().ids[:6])
    whole = measured("llama", [real(tokens().ids[:6])])
    for name in ("vo.0", "vo.1", "mlp.1"):  # mlp.0 was cut after it was measured
        by_hand = Moments()
        space = seen[name].known[name, RAW].total.shape[0]
        by_hand.add((name, RAW), found[name], space, 4 if name.startswith("vo") else 1)
        assert close(seen[name].known[name, RAW].total, by_hand.known[name, RAW].total), name
        assert not close(seen[name].known[name, RAW].total, whole.known[name, RAW].total, 1e-3)
    assert close(seen["x.0.0"].known["x.0.0", RAW].total, whole.known["x.0.0", RAW].total)
    assert not close(seen["x.1.0"].known["x.1.0", RAW].total, whole.known["x.1.0", RAW].total, 1e-3)


def test_a_cut_inside_one_stage_is_seen_by_the_next() -> None:
    cut, whole = cut_walk(inner=True)[1], cut_walk(inner=False)[1]
    assert close(cut["mlp.0"].known["mlp.0", RAW].total, whole["mlp.0"].known["mlp.0", RAW].total)
    assert not close(
        cut["x.1.0"].known["x.1.0", RAW].total, whole["x.1.0"].known["x.1.0", RAW].total, 1e-3
    )
