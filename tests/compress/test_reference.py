"""SliceGPT written again in plain numpy, with nothing of ours: spectra, sliced weights, shortcuts and logits agree."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
import torch
from folders import VOCABULARY, model_of
from numpy.typing import NDArray

from invariance.calibrate import walk
from invariance.calibrate.enter import enter
from invariance.calibrate.moments import Moments
from invariance.compress.pipeline import slice_model
from invariance.compress.planner import plan
from invariance.compress.sliced import Sliced
from invariance.core.change import Basis, Change
from invariance.method.interfaces import find
from invariance.model.canonical import canonicalize
from invariance.model.working import Whole
from invariance.recipe.recipe import Recipe

Array = NDArray[np.float64]
HEADS, KV, DIM, EPS, THETA = 4, 2, 8, 1e-5, 10000.0
WIDTH = 24
IDS = np.random.default_rng(3).integers(1, VOCABULARY, (8, 12))


# --- The reference. x is (B, T, d); weights are (out, in), as torch stores them.


def rms(x: Array, d: int) -> Array:
    """RMSNorm without its gain, dividing by the length over the original width d."""
    return x / np.sqrt((x**2).sum(-1, keepdims=True) / d + EPS)


def rope(x: Array) -> Array:
    T, D = x.shape[-2:]
    angle = np.arange(T)[:, None] * THETA ** (-np.arange(0, D, 2) / D)[None]
    cos, sin = (np.concatenate([f(angle)] * 2, -1) for f in (np.cos, np.sin))
    return x * cos + np.concatenate([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin


def attention(h: Array, W: dict[str, Array]) -> Array:
    """What the output projection reads: causal softmax attention, grouped queries."""
    B, T, _ = h.shape
    q, k, v = ((h @ W[n].T).reshape(B, T, -1, DIM).transpose(0, 2, 1, 3) for n in ("q", "k", "v"))
    q, k = rope(q), rope(k)
    k, v = (np.repeat(z, HEADS // KV, axis=1) for z in (k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(DIM)
    scores = np.where(np.tril(np.ones((T, T), dtype=bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).transpose(0, 2, 1, 3).reshape(B, T, HEADS * DIM)


def swiglu(h: Array, W: dict[str, Array]) -> Array:
    """What the down projection reads."""
    g = h @ W["gate"].T
    return g / (1 + np.exp(-g)) * (h @ W["up"].T)


def principal_axes(x: Array) -> tuple[Array, Array]:
    """Falling eigenvalues of E[x xᵀ] over all tokens, and the axes, one a column."""
    rows = x.reshape(-1, x.shape[-1])
    values, axes = np.linalg.eigh(rows.T @ rows / len(rows))
    return values[::-1], axes[:, ::-1]


@dataclass
class Reference:
    """A sliced Llama: its table, one dictionary a stage, its head, and the spectrum found at each point."""

    table: Array
    stages: list[dict[str, Array]]
    head: Array
    spectra: list[Array] = field(default_factory=list)

    def logits(self, ids: Array, d: int) -> Array:
        x = self.table[ids]
        for W in self.stages:
            h = rms(x, d)
            y = attention(h, W) @ W["o"].T if "o" in W else swiglu(h, W) @ W["down"].T
            x = x @ W["shortcut"] + y
        return rms(x, d) @ self.head.T


def slicegpt(tensors: dict[str, Array], layers: int, width: int, slice_head: bool) -> Reference:
    """Section 3 of the paper with a basis per stage, each found on what arrives behind the cuts before it."""
    names = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    d = tensors["model.embed_tokens.weight"].shape[1]
    stages: list[dict[str, Array]] = []
    for i in range(layers):
        W = {ours: tensors[f"model.layers.{i}.{theirs}.weight"] for ours, theirs in names.items()}
        for norm, readers, writer in (
            ("input_layernorm", "qkv", "o"),
            ("post_attention_layernorm", ("gate", "up"), "down"),
        ):
            gain = tensors[f"model.layers.{i}.{norm}.weight"]
            stages.append({r: W[r] * gain for r in readers} | {writer: W[writer]})
    head = tensors["lm_head.weight"] * tensors["model.norm.weight"]
    made = Reference(tensors["model.embed_tokens.weight"], stages, head)

    values, Q = principal_axes(made.table[IDS])
    made.spectra.append(values)
    Q = Q[:, :width]
    made.table = made.table @ Q
    x = made.table[IDS]
    for n, W in enumerate(stages):
        writer = "o" if "o" in W else "down"
        for reader in W.keys() - {writer}:
            W[reader] = W[reader] @ Q
        h = rms(x, d)
        read = attention(h, W) if writer == "o" else swiglu(h, W)
        arrived = (
            x @ Q.T + read @ W[writer].T
        )  # the next point, before anything that writes it is cut
        values, following = principal_axes(arrived)
        made.spectra.append(values)
        last = n + 1 == len(stages)
        following = following[:, : d if last and not slice_head else width]
        W["shortcut"] = Q.T @ following
        W[writer] = following.T @ W[writer]
        x = x @ W["shortcut"] + read @ W[writer].T
        Q = following
    made.head = made.head @ Q
    return made


# --- Ours.


class Rotary(torch.nn.Module):
    """Rotary angles in float64; the family's own are rounded to float32 in every dtype."""

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        powers = -torch.arange(0, DIM, 2, dtype=torch.float64) / DIM
        angle = (position_ids[..., None] * THETA**powers).repeat(1, 1, 2)
        return angle.cos(), angle.sin()


@cache
def dense() -> torch.nn.Module:
    rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    return model_of(
        "llama", tie_word_embeddings=False, rms_norm_eps=EPS, rope_parameters=rope_parameters
    )


def tensors() -> dict[str, Array]:
    return {n: p.detach().double().numpy() for n, p in dense().named_parameters()}


def walked(slice_head: bool) -> tuple[torch.nn.Module, list[Array]]:
    """The sliced model by the block walk in float64, and the spectrum at each point."""
    model = copy.deepcopy(dense()).double()
    model.config._attn_implementation = "sdpa"
    layout = canonicalize(model, fold=True)
    model.model.rotary_emb = Rotary()
    ids = torch.from_numpy(IDS)
    parts = Whole(model, layout)
    batches = enter(parts, [(ids, torch.ones_like(ids, dtype=torch.bool))], torch.float64)
    rotator, slicer = find("rotate", "pca")(), find("slice", "truncate")()
    spectra: list[Array] = []

    def decide(name: str, moments: Moments) -> Change:
        basis: Basis = rotator.fit(layout.spaces[name], moments)
        spectra.append(basis.energy[0].numpy())
        whole = name == layout.points[-1] and not slice_head
        k = layout.spaces[name].dim if whole else WIDTH
        return slicer.cut(layout.spaces[name], basis, k, moments)

    wanted = {p: rotator.needs for p in layout.points}
    walk.sequential(parts, batches, torch.float64, walk.Cutting(wanted, decide))
    return model, spectra


def sliced(slice_head: bool) -> Sliced:
    """The same by a recipe, calibrated in float32 as recipes are."""
    from invariance.io.data import Tokens

    step = {
        "spaces": "residual",
        "segments": "stage",
        "slice_head": slice_head,
        "rotate": "pca",
        "select": {"uniform": {"width": WIDTH}},
        "slice": "truncate",
    }
    recipe = Recipe.from_dict(
        {
            "model": "m",
            "order": "sequential",
            "calibrate": {"data": "d", "dtype": "float32"},
            "steps": [step],
        }
    )
    ids = torch.from_numpy(IDS)
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    return slice_model(dense(), plan(recipe, dense().config), tokens)  # type: ignore[arg-type]


OURS = {
    "q": "attention.q.weight",
    "k": "attention.k.weight",
    "v": "attention.v.weight",
    "o": "attention.out.weight",
    "gate": "mlp.gate.weight",
    "up": "mlp.up.weight",
    "down": "mlp.down.weight",
    "shortcut": "shortcut",
}


def far(one: Array, other: Array) -> float:
    assert one.shape == other.shape
    return float(np.abs(one - other).max() / np.abs(other).max())


def signs(one: Array, other: Array) -> Array:
    """The sign of each column, by which eigenvectors may differ."""
    return np.sign((one * other).sum(0))


def compare(
    model: torch.nn.Module, spectra: list[Array], reference: Reference, bound: float
) -> None:
    """All weights of a sliced model against the reference's, once the signs of its axes are the reference's."""
    got = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    for one, other in zip(spectra, reference.spectra, strict=True):
        assert far(one, other) < bound
    table = got["model.embed_tokens.weight"]
    s = signs(table, reference.table)
    assert far(table * s, reference.table) < bound
    for n, W in enumerate(reference.stages):
        path = f"model.layers.{n // 2}.stages.{n % 2}"
        t = signs(s[:, None] * got[f"{path}.shortcut"], W["shortcut"])
        for name, weight in W.items():
            found = got[f"{path}.{OURS[name]}"]
            if name in ("shortcut", "o", "down"):  # these write the next point
                found = s[:, None] * found * t if name == "shortcut" else t[:, None] * found
            else:
                found = found * s
            assert far(found, weight) < bound, (n, name)
        s = t
    assert far(got["lm_head.weight"] * s, reference.head) < bound


def logits_of(model: torch.nn.Module, ids: Array) -> Array:
    with torch.no_grad():
        return model.double()(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()


@cache
def reference(slice_head: bool) -> Reference:
    return slicegpt(tensors(), 2, WIDTH, slice_head)


def test_the_reference_at_full_width_is_the_model() -> None:
    whole = slicegpt(tensors(), 2, 32, True)
    assert (
        far(whole.logits(IDS, 32), logits_of(copy.deepcopy(dense()), IDS)) < 1e-6
    )  # norms of float32 there
    cut = reference(True)
    assert far(cut.logits(IDS, 32), whole.logits(IDS, 32)) > 1e-3


@pytest.mark.parametrize("slice_head", [True, False])
def test_the_block_walk_is_the_published_method_to_rounding(slice_head: bool) -> None:
    model, spectra = walked(slice_head)
    compare(model, spectra, reference(slice_head), 1e-8)
    assert far(logits_of(model, IDS), reference(slice_head).logits(IDS, 32)) < 1e-8


@pytest.mark.parametrize("slice_head", [True, False])
def test_the_recipe_is_the_published_method_to_the_rounding_of_its_calibration(
    slice_head: bool,
) -> None:
    made = sliced(slice_head)
    by_point = {name: energy[0].numpy() for name, energy in made.spectra.items()}
    points = ["x.0.0", "x.0.1", "x.1.0", "x.1.1", "x.2.0"]
    # Moments of float32 signals err by 1e-7 relative; axes by that over the relative gaps of a spectrum, here > 1e-4.
    compare(made.model, [by_point[p] for p in points], reference(slice_head), 1e-3)
    assert far(logits_of(made.model, IDS), reference(slice_head).logits(IDS, 32)) < 1e-3


def test_a_basis_found_on_the_dense_stream_is_another_one() -> None:
    """The control: were bases fitted before the cuts, the comparison would notice."""
    model, spectra = walked(True)
    whole = slicegpt(tensors(), 2, 32, True)
    assert far(spectra[0], whole.spectra[0]) < 1e-8  # nothing is cut before the first point
    assert far(spectra[2], whole.spectra[2]) > 1e-4
    with pytest.raises(AssertionError):
        compare(model, whole.spectra, reference(True), 1e-8)
