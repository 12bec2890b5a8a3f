"""Recipes on types that nobody declared: cut equals zeroed, the readers make up, plain transformers reloads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from undeclared import IDS, cache_of_layouts, differs, made, model_of, recipe  # noqa: F401 - a fixture is imported

from invariance.calibrate.tap import places, tapped
from invariance.compress.derived import cut as cutting
from invariance.compress.derived.ones import fixing_ones, helmert
from invariance.compress.derived.plan import derived_plan
from invariance.core.change import Basis
from invariance.core.errors import CertificateError, InputError
from invariance.io.narrowed import narrowed
from invariance.model.derive.certify import TOLERANCE
from invariance.recipe.recipe import Recipe

CHANNELS = {
    "spaces": "mlp",
    "rotate": "permute",
    "select": {"uniform": {"width": 32}},
    "slice": "least_squares",
}
STREAM = {
    "spaces": "residual",
    "rotate": {"pca": {"of": "normed"}},
    "select": {"uniform": {"width": 24}},
}


@pytest.mark.parametrize("kind", ["gpt_neox", "olmo2", "mixtral", "mamba"])
def test_channels_are_cut_and_plain_transformers_reloads(kind: str, tmp_path: Any) -> None:
    found, model = made(kind, CHANNELS), model_of(kind)[0]
    assert found.certificate.passed and found.error <= TOLERANCE
    assert found.cut is not None
    assert {c.value for c in found.cut.changes} == {32}
    assert set(found.widths.values()) == {32} and len(found.widths) == 2
    small = found.model.float()
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    with torch.no_grad():
        assert differs(again(IDS[:2]).logits, small(IDS[:2]).logits) < 1e-5
        assert differs(small(IDS[:2]).logits, model(IDS[:2]).logits) > 1e-4
    written = [
        again.generate(IDS[:2, :5], max_new_tokens=5, do_sample=False, use_cache=c)
        for c in (False, True)
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "phi3"])
def test_the_stream_is_turned_and_cut_under_rms_norms(kind: str, tmp_path: Any) -> None:
    found = made(kind, STREAM, CHANNELS)
    assert found.certificate.passed and found.error <= TOLERANCE
    assert found.model.config.hidden_size == 24
    small = found.model.float()
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert differs(again(IDS[:2]).logits, small(IDS[:2]).logits) < 1e-5
    again.generate(IDS[:1, :5], max_new_tokens=3, do_sample=False)


def test_a_cut_that_is_not_what_zeros_are_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invariance.model.narrow.cut.renorm", lambda *_: False)
    with pytest.raises(CertificateError, match=r"differs by .* from the one whose coordinates are"):
        made("llama", STREAM)


def test_a_basis_outside_of_the_group_fails_the_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def skewed(rotate: Any, space: Any, moments: Any) -> Basis:
        A = torch.linalg.qr(torch.randn(space.dim, space.dim, dtype=torch.float64))[0]
        return Basis((A * torch.linspace(1, 2, space.dim)).double()[None], torch.ones(1, space.dim))

    monkeypatch.setattr(cutting.checked, "fitted", skewed)
    with pytest.raises(CertificateError, match="the certificate failed"):
        made("llama", STREAM)


def test_a_budget_gives_one_width_that_a_config_can_say() -> None:
    for select in ("uniform", "global_energy"):
        found = made("gpt_neox", {**CHANNELS, "select": select}, budget={"parameters": 0.9})
        assert len(set(found.widths.values())) == 1
        small = sum(p.numel() for p in found.model.parameters())
        whole = sum(p.numel() for p in model_of("gpt_neox")[0].parameters())
        assert 0.85 * whole < small <= 0.9 * whole


def test_the_tap_sees_what_the_modules_are_given() -> None:
    model, layout = model_of("gpt_neox")
    inputs: list[Tensor] = []
    reader = model.get_submodule("gpt_neox.layers.1.mlp.dense_4h_to_h")
    hook = reader.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    flat = layout.description.flat()
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[:, -3:] = False  # padding: rows that no moment sees
    found = tapped(model, {"ch@1": places(flat, "ch@1")}, frozenset(), iter([(IDS, mask)]), skip=2)[
        "ch@1"
    ]
    hook.remove()
    (moment,) = found.moments.values()
    x = inputs[0][:, 2:-3].flatten(0, 1).double()
    assert differs(moment[0], x.T @ x) < 1e-5


def test_experts_are_measured_by_the_tokens_that_they_get() -> None:
    model, layout = model_of("mixtral")
    mask = torch.ones_like(IDS, dtype=torch.bool)
    flat = layout.description.flat()
    twin = cutting.double(model).float()
    found = tapped(twin, {"ch@0": places(flat, "ch@0")}, frozenset(), iter([(IDS, mask)]))["ch@0"]
    ((reader, counts),) = found.counts.items()
    assert reader[0].endswith("experts.down_proj")
    assert counts.sum() == 2 * IDS.numel()  # two experts a token
    assert found.moments[reader].shape == (4, 40, 40)


HEADS = {
    "spaces": "heads",
    "rotate": "permute",
    "select": {"uniform": {"width": 1}},
    "slice": "truncate",
}


def test_whole_heads_go_by_what_they_give_to_the_stream(tmp_path: Any) -> None:
    model, _ = model_of("mixtral")  # four heads of queries, two of keys and values
    found = made("mixtral", HEADS)
    assert found.certificate.passed and found.error <= TOLERANCE
    for i in (0, 1):
        reader = model.get_submodule(f"model.layers.{i}.self_attn.o_proj")
        inputs: list[Tensor] = []
        hook = reader.register_forward_pre_hook(lambda m, a, inputs=inputs: inputs.append(a[0]))
        with torch.no_grad():
            model(IDS)
        hook.remove()
        x, W = inputs[0].flatten(0, 1).double(), reader.weight.detach().double()
        given = [(x[:, g] @ W[:, g].T).square().sum() for g in (slice(0, 16), slice(16, 32))]
        best = 0 if given[0] > given[1] else 1
        own = f"model.layers.{i}.self_attn.v_proj"
        rows = model.get_submodule(own).weight.detach().double().split(8)
        kept = found.model.get_submodule(own).weight.detach().double()
        assert differs(kept, rows[best]) < 1e-6 and differs(kept, rows[1 - best]) > 1e-2
    small = narrowed(found.model.float())
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert differs(again(IDS[:2]).logits, small(IDS[:2]).logits) < 1e-5
    prompt: dict[str, Any] = {"inputs": IDS[:2, :5], "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        again.generate(**prompt, use_cache=True), again.generate(**prompt, use_cache=False)
    )


VALUES = {
    "spaces": "vo",
    "rotate": "head_svd",
    "select": {"uniform": {"width": 6}},
    "slice": "truncate",
}


def test_values_are_cut_where_they_have_a_width_of_their_own(tmp_path: Any) -> None:
    model, _ = model_of("deepseek_v3")
    found = made("deepseek_v3", VALUES)
    assert found.certificate.passed and found.error <= TOLERANCE and not found.why
    assert found.model.config.v_head_dim == 6
    given = []
    for each in (cutting.double(model), found.model):  # what each head gives to the stream
        reader = each.get_submodule("model.layers.0.self_attn.o_proj")
        inputs: list[Tensor] = []
        hook = reader.register_forward_pre_hook(lambda m, a, inputs=inputs: inputs.append(a[0]))
        with torch.no_grad():
            each(IDS)
        hook.remove()
        x, W = inputs[0].flatten(0, 1).double(), reader.weight.double()
        heads_ = zip(x.chunk(4, 1), W.chunk(4, 1), strict=True)
        given.append(torch.stack([a @ b.T for a, b in heads_]))
    lost = (given[0] - given[1]).square().sum((1, 2)) / (4 * IDS.numel())  # four copies
    energy = found.spectra["vo.0"]
    assert torch.allclose(lost, energy[:, 6:].sum(1), rtol=1e-3)  # no basis loses less
    assert float(lost.sum()) < 0.2 * float(energy.sum())
    found.model.float().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.generate(IDS[:1, :5], max_new_tokens=3, do_sample=False)


def test_readers_are_refit_by_least_squares() -> None:
    model, _ = model_of("gpt_neox")
    found = made("gpt_neox", CHANNELS)
    name = "gpt_neox.layers.0.mlp.dense_4h_to_h"
    inputs: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    x = inputs[0].flatten(0, 1).double().numpy()
    W = model.get_submodule(name).weight.detach().double().numpy()
    energy = (x**2).sum(0) * (W**2).sum(0)
    keep = np.sort(np.argsort(-energy)[:32])
    best = np.linalg.lstsq(x[:, keep], x @ W.T, rcond=None)[0].T
    got = found.model.get_submodule(name).weight.detach().double()
    assert differs(got, torch.from_numpy(best)) < 1e-3
    assert differs(got, torch.from_numpy(W[:, keep])) > 1e-2  # not what truncation leaves


def test_a_basis_under_layer_norm_fixes_the_ones() -> None:
    d, g = 7, torch.Generator().manual_seed(0)
    C = torch.randn(d, d, generator=g, dtype=torch.float64)
    P = torch.eye(d, dtype=torch.float64) - 1 / d
    energy, Q = torch.linalg.eigh(P @ C @ C.T @ P)
    R = fixing_ones(Basis(Q.flip(-1)[None], energy.flip(-1)[None])).A.matrix()[0]
    ones = torch.ones(d, dtype=torch.float64)
    assert torch.allclose(R @ ones, ones) and torch.allclose(R @ R.T, torch.eye(d).double())
    H = helmert(d)
    assert torch.allclose(H.T @ H, torch.eye(d - 1).double()) and torch.allclose(ones @ H, 0 * H[0])
    for k in range(2, d):  # the first k coordinates hold the first k − 1 axes
        top = Q.flip(-1)[:, : k - 1]
        assert torch.allclose(R[:, :k] @ R[:, :k].T @ top, top)


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        (
            "gpt_neox",
            {"steps": [{**CHANNELS, "spaces": "qk"}]},
            "no space that can be cut is called",
        ),
        ("gpt_neox", {"steps": [STREAM], "stock": True}, "under LayerNorms"),
        ("gpt_neox", {"steps": [VALUES]}, "values have the width of queries and keys"),
        ("mixtral", {"steps": [{**HEADS, "slice": "least_squares"}]}, "is not refit"),
        ("gpt_neox", {"order": "sequential"}, "needs a declared family"),
        (
            "gpt_neox",
            {"budget": {"flops": 0.9}, "steps": [{**CHANNELS, "select": "uniform"}]},
            "alone",
        ),
        ("llama", {"steps": [{**STREAM, "slice": "least_squares"}]}, "readers are not refit"),
        ("llama", {"steps": [{**STREAM, "rotate": "pca"}]}, "Use `of: normed`"),
        ("llama", {"steps": [{**CHANNELS, "rotate": "pca"}]}, "admits 'permutation' only"),
        ("gpt_neox", {"steps": [{**CHANNELS, "slice": "bias_compensation"}]}, "asks for"),
    ],
)
def test_what_a_derived_layout_cannot_give_is_refused_before_any_work(
    kind: str, change: dict[str, Any], says: str
) -> None:
    model, layout = model_of(kind)
    asked = Recipe.from_dict(
        {"model": "tiny", "calibrate": {"data": "t.npy"}, "steps": [CHANNELS], **change}
    )
    with pytest.raises(InputError, match=says):
        derived_plan(asked, model.config, layout)


def test_widths_that_no_config_says_are_refused_with_the_line() -> None:
    with pytest.raises(InputError, match="no config of type 'gpt_neox' says these widths"):
        made("gpt_neox", {**CHANNELS, "spaces": "mlp.0"}, stock=True)


def test_the_model_that_is_given_stays_as_it_was() -> None:
    model, _ = model_of("llama")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    assert isinstance(model, nn.Module)
    made("llama", STREAM)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_a_method_of_many_spaces_is_refused_before_anything_is_measured() -> None:
    model, layout = model_of("llama")
    step = {**CHANNELS, "rotate": "learned_rotation", "spaces": "residual", "slice": "truncate"}
    with pytest.raises(InputError, match="'learned_rotation' fits several"):
        derived_plan(recipe(step), model.config, layout)
