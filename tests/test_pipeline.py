"""Moments, their store, the block walk in its orders, and what a run promises about the model it is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import VOCABULARY, model_of, save_tokens, stored_numbers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import tiny, tiny_models
from torch import Tensor, nn
from transformers import PreTrainedModel

from invariance import calibration, files, pipeline, verify, walk
from invariance.canonical import canonicalize
from invariance.data import Tokens, load_tokens
from invariance.errors import CertificateError, InputError
from invariance.families import architecture
from invariance.interfaces import Statistic
from invariance.labels import label
from invariance.layout import Layout
from invariance.models import weights_digest
from invariance.moments import Moment, Moments, Store
from invariance.pipeline import Sliced, slice_model
from invariance.plan import plan
from invariance.recipe import Recipe
from invariance.run import compress, outcome, run
from invariance.space import Change, Group, Space
from invariance.verify import logits, relative_error, tolerance

RAW, NORMED, MEAN, WEIGHTED = Statistic.RAW, Statistic.NORMED, Statistic.MEAN, Statistic.WEIGHTED
RESIDUAL = {"spaces": "residual", "rotate": "pca", "select": {"uniform": {"width": 24}}}
MLP = {"spaces": "mlp", "rotate": "permute", "select": {"uniform": {"width": 40}}, "slice": "least_squares"}
HEADS = {"spaces": "vo", "rotate": "head_svd", "select": {"uniform": {"width": 6}}}
ROUNDING = 1e-12  # of sums of a few hundred float64 products, relative


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.chdir(root)
        save_tokens(root / "tokens.npy", sequences=32)
        yield


@cache
def dense(family: str = "llama", **options: Any) -> PreTrainedModel:
    return model_of(family, **options)


def tokens() -> Tokens:
    return load_tokens("tokens.npy", None, vocab_size=VOCABULARY)


def recipe(*steps: dict[str, Any], calibrate: dict[str, Any] | None = None, **keys: Any) -> Recipe:
    found = {"data": "tokens.npy", "dtype": "float32", "batch": 4} | (calibrate or {})
    return Recipe.from_dict({"model": "m", "calibrate": found, "steps": list(steps)} | keys)


def sliced(asked: Recipe, model: PreTrainedModel | None = None, store: Path | None = None) -> Sliced:
    model = dense() if model is None else model
    return slice_model(model, plan(asked, model.config), tokens(), store=store)


def close(one: Tensor, other: Tensor, bound: float = ROUNDING) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= bound * other.abs().max())


def exact(family: str, fold: bool = True, **options: Any) -> tuple[PreTrainedModel, Layout]:
    """A float64 model in canonical form."""
    model = model_of(family, **options).double()
    model.config._attn_implementation = "sdpa"
    return model, canonicalize(model, fold=fold)


def everything(layout: Layout) -> dict[str, frozenset[Statistic]]:
    return {
        n: frozenset({RAW, WEIGHTED, MEAN, *([NORMED] if s.kind == "residual" else [])})
        for n, s in layout.spaces.items()
    }


def measured(
    family: str, batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float64
) -> Moments:
    model, layout = exact(family)
    return walk.oneshot(model, layout, walk.enter(model, layout, batches, dtype), everything(layout), dtype)


def real(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, torch.ones_like(ids, dtype=torch.bool)


def same(one: Moments, other: Moments, bound: float = ROUNDING) -> None:
    assert one.known.keys() == other.known.keys()
    for key, moment in one.known.items():
        assert moment.count == pytest.approx(other.known[key].count, rel=bound), key
        assert close(moment.total, other.known[key].total, bound), key


# --- Moments.


@given(
    seed=st.integers(0, 999), cuts=st.lists(st.integers(0, 40), max_size=4), heads=st.sampled_from([(1, 1), (2, 4)]),
    statistic=st.sampled_from([RAW, MEAN]),
)  # fmt: skip
def test_taking_tokens_in_by_parts_is_taking_them_in_at_once(
    seed: int, cuts: list[int], heads: tuple[int, int], statistic: Statistic
) -> None:
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole, parts, merged = Moments(), Moments(), Moments()
    key = ("vo.0", statistic)
    whole.add(key, x, *heads)
    for part in x.tensor_split(sorted(cuts)):
        parts.add(key, part, *heads)
        alone = Moments()
        alone.add(key, part, *heads)
        merged = merged.merge(alone)
    same(parts, whole)
    same(merged, whole)


def test_a_moment_is_the_sum_of_outer_products_of_each_copys_heads() -> None:
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    moments.add(("vo.0", RAW), x, copies=2, heads=4)  # heads of 2 dims; two neighbours share a copy
    found = moments.known["vo.0", RAW]
    for copy in range(2):
        rows = torch.cat([x[:, 4 * copy : 4 * copy + 2], x[:, 4 * copy + 2 : 4 * copy + 4]])
        assert close(found.total[copy], rows.T @ rows)
    assert found.count == 5


def test_a_mean_is_over_tokens_and_the_heads_that_share_a_copy() -> None:
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    moments.add(("vo.0", MEAN), x, copies=2, heads=4)
    found = moments.mean(Space("vo.0", "vo", 2, Group.INVERTIBLE, 2))
    assert close(found, x.reshape(5, 2, 2, 2).mean((0, 2)))
    assert not close(
        found, x.reshape(5, 2, 2, 2).mean((0, 1))
    )  # the control: neighbours share, not every second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_batches_are_kept_in_float64(dtype: torch.dtype) -> None:
    moments = Moments()
    moments.add(("x.0.0", RAW), torch.full((1, 1), 2.0**13, dtype=dtype))
    for _ in range(100):
        moments.add(("x.0.0", RAW), torch.ones(1, 1, dtype=dtype))
    total = moments.known["x.0.0", RAW].total
    assert total.dtype is torch.float64 and total.item() == 2.0**26 + 100
    assert torch.tensor(2.0**26) + 1 == 2.0**26  # the control: float32 would have lost every one of them


def test_products_of_bfloat16_signals_are_exact() -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    moments = Moments()
    moments.add(("x.0.0", RAW), x)
    assert close(moments.known["x.0.0", RAW].total[0], x.double().T @ x.double(), 1e-6)


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
    batches = walk.enter(twin, layout, [real(ids)], torch.float64)
    walk.oneshot(twin, layout, batches, {}, torch.float64)
    kept: list[Tensor] = []
    last = twin.get_submodule(layout.architecture.final_norm)
    handle = last.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    logits(twin, ids)
    handle.remove()
    assert close(batches[0].x, kept[0])


def test_a_walk_that_gives_every_block_what_the_first_is_given_is_caught() -> None:
    options = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    twin = verify.exact_copy(tiny("qwen2", **options))
    batches = walk.enter(twin, label(twin), [real(torch.arange(1, 13)[None])], torch.float64)
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
        "gemma3_text": ("model.layers", "input_layernorm", "self_attn.o_proj", "pre_feedforward_layernorm",
                        "mlp.down_proj", "model.norm"),
        "llama": ("model.layers", "input_layernorm", "self_attn.o_proj", "post_attention_layernorm",
                  "mlp.down_proj", "model.norm"),
        "opt": ("model.decoder.layers", "self_attn_layer_norm", "self_attn.out_proj", "final_layer_norm", "fc2",
                "model.decoder.final_layer_norm"),
        "phi": ("model.layers", "input_layernorm", "self_attn.dense", None, "mlp.fc2", "model.final_layernorm"),
    }[family]  # fmt: skip
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
        assert not close(walked.known[name, WEIGHTED].mean, by_hand.known[name, RAW].mean, 1e-3), name
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

    batches = walk.enter(model, layout, [real(tokens().ids[:6])], torch.float64)
    walk.sequential(model, layout, batches, everything(layout), torch.float64, decide)
    return model, seen


def test_sequential_moments_are_those_behind_the_cuts_before_them() -> None:
    model, seen = cut_walk(inner=True)
    found: dict[str, Tensor] = {}
    for i in range(2):
        stages = model.model.layers[i].stages  # type: ignore[union-attr]
        for name, module in ((f"vo.{i}", stages[0].attention.out), (f"mlp.{i}", stages[1].mlp.down)):
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
    assert not close(cut["x.1.0"].known["x.1.0", RAW].total, whole["x.1.0"].known["x.1.0", RAW].total, 1e-3)


# --- The store.


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The spaces that each oneshot walk measures, a list a walk."""
    calls: list[list[str]] = []
    oneshot = walk.oneshot

    def counted(model: Any, layout: Any, batches: Any, wanted: Any, *rest: Any) -> Moments:
        calls.append(sorted(wanted))
        return oneshot(model, layout, batches, wanted, *rest)

    monkeypatch.setattr(walk, "oneshot", counted)
    return calls


def test_a_second_recipe_on_the_same_model_and_tokens_measures_nothing(
    walks: list[list[str]], tmp_path: Path
) -> None:
    first = sliced(recipe(RESIDUAL, MLP), store=tmp_path)
    assert len(walks) == 1
    again = sliced(recipe(RESIDUAL, MLP), store=tmp_path)
    narrower = RESIDUAL | {"select": {"uniform": {"width": 16}}, "segments": "stage"}
    sliced(recipe(narrower, {"spaces": "mlp.1", "rotate": "permute"}), store=tmp_path)
    assert len(walks) == 1
    assert weights_digest(first.model) == weights_digest(again.model)
    sliced(recipe(RESIDUAL, MLP, HEADS), store=tmp_path)
    assert walks[1:] == [["vo.0", "vo.1"]]  # what is new, and nothing else


CHANGES: dict[str, Callable[[], tuple[Recipe, PreTrainedModel]]] = {
    "weights": lambda: (recipe(RESIDUAL), model_of("llama", seed=1)),
    "config": lambda: (recipe(RESIDUAL), model_of("llama", rms_norm_eps=1e-4)),
    "fewer tokens": lambda: (recipe(RESIDUAL, calibrate={"sequences": 31}), dense()),
    "dtype": lambda: (recipe(RESIDUAL, calibrate={"dtype": "bfloat16"}), dense()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_weights_tokens_or_numbers_are_measured_anew(
    walks: list[list[str]], tmp_path: Path, what: str
) -> None:
    sliced(recipe(RESIDUAL), store=tmp_path)
    asked, model = CHANGES[what]()
    assert asked.calibrate is not None
    found = load_tokens("tokens.npy", None, vocab_size=VOCABULARY, sequences=asked.calibrate.sequences)
    slice_model(model, plan(asked, model.config), found, store=tmp_path)
    assert len(walks) == 2 and len(list(tmp_path.iterdir())) == 2


def test_batch_size_and_widths_are_no_part_of_the_key(walks: list[list[str]], tmp_path: Path) -> None:
    sliced(recipe(RESIDUAL), store=tmp_path)
    sliced(recipe(RESIDUAL, calibrate={"batch": 16}), store=tmp_path)
    assert len(walks) == 1


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, None])
def test_a_stored_file_that_cannot_be_read_counts_as_missing(
    walks: list[list[str]], tmp_path: Path, content: bytes | None
) -> None:
    first = sliced(recipe(RESIDUAL), store=tmp_path)
    (path,) = tmp_path.glob("*/x.1.0.raw.safetensors")
    path.write_bytes(path.read_bytes()[:-8] if content is None else content)
    again = sliced(recipe(RESIDUAL), store=tmp_path)
    assert walks[1:] == [["x.1.0"]]
    assert weights_digest(first.model) == weights_digest(again.model)
    sliced(recipe(RESIDUAL), store=tmp_path)
    assert len(walks) == 2  # and is written again


def test_an_interrupted_save_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = Moments({("x.0.0", RAW): Moment(torch.eye(3, dtype=torch.float64)[None], 7)})
    store = Store.keyed(tmp_path, {"weights": "w"})

    def stopped(_tensors: Any, path: Path, _metadata: Any = None) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            store.save(moments)
    assert list(store.folder.iterdir()) == []
    assert store.load(moments.known).known == {}
    store.save(moments)
    same(store.load(moments.known), moments)


# --- Runs.


@pytest.mark.parametrize("rotator", ["random_orthogonal", "hadamard", "identity"])
@pytest.mark.parametrize("order", ["oneshot", "sequential"])
def test_bases_that_need_no_moments_need_no_tokens_and_no_walk(
    rotator: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_a: Any, **_k: Any) -> None:
        raise AssertionError("a walk over tokens")

    monkeypatch.setattr(walk, "oneshot", never)
    monkeypatch.setattr(walk, "enter", never)
    keys = {"spaces": "residual", "rotate": rotator, "select": {"uniform": {"width": 28}}}
    asked = Recipe.from_dict(
        {"model": "m", "order": order, "steps": [keys, {"spaces": "vo", "rotate": "identity"}]}
    )
    small = compress(dense(), asked)
    assert small.get_input_embeddings().weight.shape[1] == 28
    with pytest.raises(AssertionError, match="a walk over tokens"):
        compress(dense(), recipe(RESIDUAL, calibrate={"batch": 3}, seed=5, order="sequential"))


@pytest.mark.parametrize("order", ["oneshot", "sequential", "dense_target"])
@pytest.mark.parametrize("family", ["llama", "opt", "phi", "qwen3"])
def test_the_model_that_is_given_is_left_as_it_is(family: str, order: str) -> None:
    model = dense(family)
    before, config, attention = (
        weights_digest(model),
        model.config.to_json_string(),
        model.config._attn_implementation,
    )
    modules = [type(m) for m in model.modules()]
    small = compress(model, recipe(RESIDUAL, MLP, HEADS, order=order))
    assert weights_digest(model) == before and model.config.to_json_string() == config
    assert model.config._attn_implementation == attention and [type(m) for m in model.modules()] == modules
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}


@pytest.mark.parametrize("order", ["oneshot", "sequential"])
def test_a_rotation_that_is_not_exact_stops_the_run(
    order: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real_one = verify.reparametrize

    def faulty(model: PreTrainedModel, layout: Layout, changes: Any) -> None:
        real_one(model, layout, changes)
        with torch.no_grad():
            next(iter(model.get_submodule(layout.edges[0].stage).parameters())).mul_(1 + 1e-8)

    monkeypatch.setattr(verify, "reparametrize", faulty)
    sliced_at_all: list[Any] = []
    monkeypatch.setattr(pipeline, "reparametrize", lambda *a: sliced_at_all.append(a))
    with pytest.raises(CertificateError, match="Nothing is written"):
        sliced(recipe(RESIDUAL, order=order))
    assert order != "oneshot" or not sliced_at_all  # sequential orders find their bases behind cuts


SEGMENTS = [
    ("global", 0),
    ("block", 2),
    ("stage", 6),
    ({"every": 1}, 2),
    ({"every": 2}, 1),
    ({"every": 3}, 0),
]


@pytest.mark.parametrize("order", ["oneshot", "sequential"])
@pytest.mark.parametrize(("segments", "count"), SEGMENTS, ids=str)
def test_shortcuts_lie_where_two_bases_meet_and_nowhere_else(segments: Any, count: int, order: str) -> None:
    """Three blocks of two stages; the point before the head shares the last block's basis."""
    model = dense(num_hidden_layers=3)
    made = outcome(model, recipe(RESIDUAL | {"segments": segments}, order=order), evaluate=False)
    parts = made.report["parameters"]["sliced"]
    inner = getattr(made.model, "inner", made.model)
    assert parts["shortcuts"] == count * 24 * 24
    assert (len(label(inner).shortcuts) if count else 0) == count
    assert made.report["model"]["stock"] == (count == 0)
    assert sum(p.numel() for p in made.model.parameters()) == parts["total"]


@pytest.mark.parametrize("order", ["oneshot", "sequential", "dense_target"])
@pytest.mark.parametrize("family", ["llama", "opt", "phi", "qwen3", "gemma3_text"])
def test_every_space_may_have_a_width_of_its_own(family: str, order: str, tmp_path: Path) -> None:
    model = dense(family)
    points = RESIDUAL | (
        {"rotate": "identity"} if family == "gemma3_text" else {}
    )  # its stream does not turn
    layout = plan(recipe(points), model.config).layout
    widths: dict[str, int] = {}
    steps = []
    for n, (name, space) in enumerate(layout.spaces.items()):
        if space.normed:
            continue
        turned = space.kind == "qk" and space.rotary > 0
        widths[name] = space.dim - 2 if turned else max(1, space.dim - 1 - n % (space.dim // 2))
        keys = {"rotate": "rope_pairs" if turned else "qk_svd"}
        base = {"residual": points, "mlp": MLP, "vo": HEADS, "qk": keys, "heads": MLP}[space.kind]
        segments = {"segments": "stage"} if space.kind == "residual" else {}
        steps.append(base | segments | {"spaces": name, "select": {"uniform": {"width": widths[name]}}})
    made = outcome(model, recipe(*steps, order=order), evaluate=False)
    assert {n: made.report["widths"][n] for n in widths} == widths
    made.model.save_pretrained(tmp_path)
    assert stored_numbers(tmp_path) == made.report["parameters"]["sliced"]["total"]
    ids = tokens().ids[:1, :5]
    kept = [
        made.model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=c).tolist()
        for c in (True, False)
    ]
    assert kept[0] == kept[1]
    assert bool(torch.isfinite(logits(made.model, ids)).all())


def test_sequential_at_full_width_is_exact() -> None:
    made = sliced(recipe({"spaces": "residual", "segments": "stage", "rotate": "pca"},
                         {"spaces": "mlp", "rotate": "permute"}, order="sequential"))  # fmt: skip
    twin = verify.exact_copy(dense())
    ids = tokens().ids[:2]
    assert relative_error(logits(twin, ids), logits(made.model, ids)) <= tolerance(
        torch.float64, made.layout.depth
    )


def stream(model: nn.Module, ids: Tensor) -> Tensor:
    """What arrives before the final norm, where no basis of it has changed."""
    found: list[Tensor] = []
    inner = getattr(model, "inner", model)
    norm = inner.get_submodule(architecture(inner.config).final_norm)
    handle = norm.register_forward_pre_hook(lambda _m, a: found.append(a[0].detach().double()))
    logits(model, ids)  # type: ignore[arg-type]
    handle.remove()
    return found[0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("held_out", [False, True])
def test_refitting_to_the_dense_stream_brings_the_sliced_one_nearer(held_out: bool, family: str) -> None:
    ids = torch.from_numpy(np.load(save_tokens(Path("more.npy"), 16, seed=9)))
    ids = ids if held_out else tokens().ids
    goal = stream(dense(family), ids)
    errors = {
        order: relative_error(goal, stream(compress(dense(family), recipe(MLP, HEADS, order=order)), ids))
        for order in ("sequential", "dense_target")
    }
    assert errors["dense_target"] < errors["sequential"]


@pytest.mark.parametrize("family", ["llama", "opt", "phi", "gemma3_text"])
def test_the_stream_that_is_carried_is_the_refit_models_own(family: str) -> None:
    """The walk multiplies what the writers read once, before the cut; the cut model must compute the same."""
    model, layout = exact(family)
    basis = {n: layout.spaces[n].element(seed=3) for n in layout.spaces}

    def decide(name: str, _: Moments) -> Change | None:
        whole = Change.rotation(basis[name])
        kind, k = layout.spaces[name].kind, whole.width - 2
        if kind == "heads":  # of llama's two groups one stays in the first block, none in the second
            k = whole.width - 1 - int(name[-1])
        return whole if kind == "qk" else Change(whole.encode[..., :k], whole.decode[..., :k])

    ids = tokens().ids
    inner = {n: frozenset({RAW}) for n, s in layout.spaces.items() if s.kind != "residual"}
    batches = walk.enter(model, layout, [real(part) for part in ids.split(8)], torch.float64)
    walk.sequential(model, layout, batches, inner, torch.float64, decide, follow=True)
    carried = torch.cat([b.x for b in batches])
    assert close(stream(model, ids), carried, bound=1e-9)
    assert not close(stream(exact(family)[0], ids), carried, bound=1e-2)


def test_a_report_is_plain_json(tmp_path: Path) -> None:
    report = outcome(dense(), recipe(RESIDUAL), evaluate=False).report
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
@pytest.mark.parametrize("tie", ["keep", "untie"])
@pytest.mark.parametrize("share", [0.9, 0.8])
def test_a_budget_is_never_overspent(family: str, tie: str, share: float) -> None:
    model = dense(family, tie_word_embeddings=family == "llama")
    step = {"spaces": "residual", "rotate": "random_orthogonal", "select": "uniform"}
    found = outcome(
        model, recipe(step, budget={"parameters": share}, tie=tie if family == "llama" else "untie")
    )
    stored, before = (sum(p.numel() for p in m.parameters()) for m in (found.model, model))
    assert stored == found.report["parameters"]["sliced"]["total"] <= share * before


def test_the_held_out_part_does_not_depend_on_the_batch_size() -> None:
    weights = []
    for batch in (2, 16, 32):
        asked = recipe(MLP, order="dense_target", calibrate={"batch": batch})
        weights.append(sliced(asked).model.get_submodule("model.layers.1.stages.1.mlp.down").weight)
    assert all(relative_error(weights[0], w) < 1e-3 for w in weights[1:])


def test_following_the_dense_stream_refuses_too_few_sequences_to_hold_one_out() -> None:
    asked = recipe({"spaces": "mlp", "select": {"uniform": {"keep": 0.5}}}, order="dense_target")
    few = Tokens(tokens().ids[:3], tokens().mask[:3])
    with pytest.raises(InputError, match="3 sequences"):
        slice_model(dense(), plan(asked, dense().config), few)


@pytest.mark.parametrize(("family", "part"), [("llama", 0), ("gemma3_text", 0), ("gemma3_text", 1)])
def test_a_dense_stream_that_was_kept_and_one_walked_again_give_one_model(
    family: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part is what a branch gives, where a norm behind it parts that from the stream."""
    asked = recipe(MLP, HEADS, order="dense_target")
    weight = "model.layers.1.stages.1.mlp.down.weight"
    kept = sliced(asked, dense(family)).model.get_parameter(weight)
    real = walk.oneshot

    def disturbed(*args: Any) -> Moments:
        found = real(*args)
        for passed in args[-1]:
            behind, given = passed[0]
            other = behind.flip(-1)  # another length a norm would not see
            passed[0] = (other, other if behind is given else given) if part == 0 else (behind, 1.1 * given)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(walk, "oneshot", disturbed)  # the control: the streams are what is followed
        disturbed_one = sliced(asked, dense(family)).model.get_parameter(weight)
        assert relative_error(kept, disturbed_one) > 1e-3
    monkeypatch.setattr(calibration.Calibration, "_streams_fit", lambda self, batches: False)
    assert torch.equal(kept, sliced(asked, dense(family)).model.get_parameter(weight))


def test_a_checkpoint_keeps_its_dtype(tmp_path: Path) -> None:
    model = model_of("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    text = recipe(MLP).to_yaml().replace("model: m", f"model: {tmp_path / 'model'}")
    (tmp_path / "recipe.yaml").write_text(text)
    report = run(tmp_path / "recipe.yaml", tmp_path / "out", [])
    assert report["model"]["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out/model/model.safetensors").values()} == {torch.bfloat16}


def test_refitting_readers_too_brings_predictions_nearer() -> None:
    """By what they predict on tokens that were not seen: KL from the dense model, three layers deep."""
    ids = torch.from_numpy(np.load(save_tokens(Path("unseen.npy"), 16, seed=11)))
    model = dense(num_hidden_layers=4)
    goal = logits(model, ids).double().log_softmax(-1)
    loss = {}
    for refit in ("writers", "both"):
        small = compress(model, recipe(MLP, HEADS, order="dense_target", refit=refit))
        loss[refit] = (goal.exp() * (goal - logits(small, ids).double().log_softmax(-1))).sum(-1).mean()
    assert loss["both"] < loss["writers"]


def test_readers_of_an_untouched_stream_stay_as_they_are() -> None:
    """Nothing is cut before block 1, so what is refit there has nothing to make up for."""
    step = {"spaces": "mlp.1", "rotate": "permute", "select": {"uniform": {"width": 40}}}
    found = sliced(recipe(step, order="dense_target")).model
    before = dense().get_parameter("model.layers.1.self_attn.q_proj.weight")
    after = found.get_parameter("model.layers.1.stages.0.attention.q.weight")
    assert relative_error(before, after) < 1e-5


@pytest.mark.parametrize("rotate", ["fluctuation", "obs", "ridge_leverage", "permute"])
def test_every_choice_of_channels_can_follow_the_dense_stream(rotate: str) -> None:
    step = MLP | {"rotate": rotate}
    assert sliced(recipe(step, order="dense_target")).widths["mlp.1"] == 40
