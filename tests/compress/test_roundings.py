"""Models rounded by what layers read: their losses, their bytes, what they store, that scaling changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from folders import model_of
from tiny import redraw
from torch import nn
from transformers import AutoModelForCausalLM

from invariance import compress
from invariance.compress.rounding import inputs
from invariance.compress.rounding.apply import quantized, round_model
from invariance.compress.rounding.scheme import packed_bytes, scheme
from invariance.core.errors import InputError
from invariance.io.data import Tokens
from invariance.model.verify import logits
from invariance.recipe.quantize import Quantize
from invariance.recipe.recipe import Recipe

IDS = torch.randint(1, 40, (12, 24), generator=torch.Generator().manual_seed(0))
TEXT = Tokens.full(IDS)


def asked(how, **options) -> Quantize:
    return Quantize(**{"round": how, "bits": 3, "group": 8, "tables": None} | options)


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_layers_that_read_the_same_are_one_group_with_the_moment_of_their_inputs(family) -> None:
    model = model_of(family)
    paths = list(scheme(model, asked("gptq")))
    groups = inputs.find(model, paths, TEXT)
    assert sorted(p for g in groups for p in g.paths) == sorted(paths)
    together = {frozenset(p.rsplit(".", 1)[-1] for p in g.paths) for g in groups}
    assert any({"q_proj", "k_proj", "v_proj"} <= group for group in together)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[3, 10:] = False
    inputs.measure(model, groups, Tokens(IDS, mask))
    for group in groups[:4]:
        seen = []
        module = model.get_submodule(group.paths[-1])
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        logits(model, IDS[:3])
        logits(model, IDS[4:])
        model(input_ids=IDS[3:4, :10])
        handle.remove()
        x = torch.cat([s.reshape(-1, s.shape[-1]) for s in seen]).double()
        assert torch.allclose(group.moment.double(), x.mT @ x / len(x), rtol=1e-4, atol=1e-5)


def moved(model, twin) -> float:
    """Mean squared error of the logits on the text."""
    return float((logits(model, IDS) - logits(twin, IDS)).square().mean())


def test_gptq_moves_logits_less_than_nearest_at_the_same_bytes() -> None:
    for seed in range(3):
        model = redraw(model_of("llama"), seed)
        near, fed = (quantized(model, asked(how), TEXT) for how in ("nearest", "gptq"))
        assert moved(model, fed) < moved(model, near)
    sizes = [packed_bytes(model, asked(h), torch.float32) for h in ("nearest", "gptq", "awq")]
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("family", ["llama", "opt", "phi", "gemma3_text"])
def test_scaling_behind_a_norm_changes_nothing_where_it_is_done(family, monkeypatch) -> None:
    """With so many bits that rounding is small, what AWQ made computes what the model did."""
    model = model_of(family)
    if family != "phi":  # whose block has one norm for attention and MLP: still one group
        assert any(g.norm for g in inputs.find(model, list(scheme(model, asked("awq"))), TEXT))
    before = {n: p.clone() for n, p in model.named_parameters()}
    twin = quantized(model, asked("awq", bits=8), TEXT)
    error = moved(model, twin) / float(logits(model, IDS).square().mean())
    assert error < 1e-3
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # a copy
    gains = [
        not torch.equal(dict(twin.named_parameters())[n], p)
        for n, p in before.items()
        if p.dim() == 1 and n.endswith("weight")
    ]
    assert any(gains) == (family != "gemma3_text")  # whose gains are 1 + w


class Leaky(nn.Module):
    """A norm that the residual stream reads too: its gain cannot be changed."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + self.norm(x).flip(-1)


def test_a_norm_that_something_else_reads_is_left_alone() -> None:
    model = model_of("llama")
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    seen = mlp.forward
    mlp.forward = lambda x: seen(x) + x  # the block reads the norm's output itself
    gain = layer.post_attention_layernorm.weight.clone()
    twin = quantized(model, asked("awq"), TEXT)
    assert torch.equal(twin.model.layers[0].post_attention_layernorm.weight, gain)
    assert not torch.equal(
        twin.model.layers[0].input_layernorm.weight, layer.input_layernorm.weight
    )
    assert attention is layer.self_attn


@pytest.mark.parametrize("how", ["gptq", "awq", {"wanda": {"keep": 0.5}}, {"sparsegpt": {}}])
def test_what_was_rounded_is_saved_and_read_again(how, tmp_path) -> None:
    made = round_model(model_of("llama"), asked(how), TEXT)
    assert 0 < made.error < 1
    made.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, IDS), logits(made.model, IDS))
    masked = not isinstance(how, str)
    config = json.loads((tmp_path / "config.json").read_text())
    assert ("quantization_config" in config) != masked
    if masked:
        W = again.model.layers[0].mlp.up_proj.weight
        assert (W == 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_a_mask_and_what_it_keeps_are_what_is_counted() -> None:
    model = model_of("llama")
    whole = packed_bytes(model, None, torch.float16)
    kept = packed_bytes(model, asked({"wanda": {"keep": 0.5}}), torch.float16)
    places = sum(model.get_submodule(p).weight.numel() for p in scheme(model, asked("wanda")))
    assert whole - kept == places * 2 - places // 8 - places


def test_a_large_model_is_walked_through_in_portions(monkeypatch) -> None:
    model = model_of("llama")
    groups = inputs.find(model, list(scheme(model, asked("gptq"))), TEXT)
    assert [len(p) for p in inputs.portions(model, groups)] == [len(groups)]
    monkeypatch.setattr(inputs, "HELD_BYTES", 1)
    assert [len(p) for p in inputs.portions(model, groups)] == [1] * len(groups)
    near, fed = (quantized(model, asked(how), TEXT) for how in ("nearest", "gptq"))
    assert moved(model, fed) < moved(model, near)


STEPS = [{"spaces": "mlp", "rotate": "identity"}]


def test_a_recipe_names_a_rounding_with_its_options(tmp_path, monkeypatch) -> None:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path))
    np.save("t.npy", IDS.numpy())
    spec = {"model": "tiny", "steps": STEPS, "quantize": {"bits": 3, "group": 8, "round": "gptq"}}
    with pytest.raises(InputError, match=r"'gptq' reads moments.*Add `calibrate"):
        Recipe.from_dict(spec)
    spec["calibrate"] = {"data": "t.npy"}
    recipe = Recipe.from_dict(spec)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    near = {**spec, "quantize": {"bits": 3, "group": 8}}
    model = model_of("llama")
    assert moved(model, compress(model, recipe)) < moved(model, compress(model, near))
    spec["quantize"]["round"] = {"gptq": {"rigde": 0.1}}
    with pytest.raises(InputError, match="'gptq' has no option 'rigde'; did you mean 'ridge'"):
        Recipe.from_dict(spec)
