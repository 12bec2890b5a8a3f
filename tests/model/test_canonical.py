"""The canonical form: the same function, nothing left on the norms, and nothing done twice."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import canonical_copy, seeds, stored, tiny, tiny_models, tokens, weights
from torch import nn

from invariance.core.errors import InputError
from invariance.model import verify
from invariance.model.axes import Role
from invariance.model.canonical import canonicalize
from invariance.model.modules import Norm
from invariance.model.verify import logits, relative_error, tolerance


def norms(model: nn.Module) -> list[Norm]:
    return [m for m in model.modules() if isinstance(m, Norm)]


def tie_of(model, keep: bool) -> str:
    return "keep" if keep and hasattr(model.config, "rms_norm_eps") else "untie"


@given(model=tiny_models(), keep=st.booleans(), seed=seeds)
def test_folding_leaves_the_logits(model, keep, seed):
    twin = verify.exact_copy(model)
    before = logits(twin, tokens(seed))
    layout = canonicalize(twin, fold=True, tie=tie_of(model, keep))
    bound = tolerance(torch.float64, layout.depth)
    assert relative_error(before, logits(twin, tokens(seed))) <= bound
    norms(twin)[-1].gain = nn.Parameter(
        torch.linspace(0.9, 1.1, norms(twin)[-1].d, dtype=torch.float64)
    )
    assert relative_error(before, logits(twin, tokens(seed))) > 1000 * bound


@given(model=tiny_models(), keep=st.booleans())
def test_a_folded_model_has_bare_norms_and_centred_writers(model, keep):
    centred = canonicalize(copy.deepcopy(model), fold=False).centred
    twin, layout = canonical_copy(model, fold=True, tie=tie_of(model, keep))
    assert layout.folded and not layout.centred
    behind = [m for n, m in twin.named_modules() if n.endswith(("post", "q_norm", "k_norm"))]
    bare = [n for n in norms(twin) if n not in behind]
    assert all(n.gain is None and n.bias is None and not n.centred for n in bare)
    assert all(n.gain is not None for n in behind) and len(bare) == layout.depth + 1
    means = [
        twin.get_parameter(name).mean(i).abs().amax().item()
        for name, axes in layout.axes.items()
        for i, a in enumerate(axes)
        if a is not None and a.role is Role.WRITE and layout.spaces[a.space].kind == "residual"
    ]
    bound = tolerance(torch.float64, layout.depth)
    assert all(mean <= bound for mean in means) if centred else max(means) > 1000 * bound


@given(model=tiny_models(), keep=st.booleans(), fold=st.booleans())
def test_a_second_time_changes_nothing(model, keep, fold):
    layout = canonicalize(model, fold=fold, tie=tie_of(model, keep))
    before = weights(model)
    assert canonicalize(model, fold=fold, tie=tie_of(model, keep)) == layout
    after = weights(model)
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in after)


@given(model=tiny_models())
def test_without_folding_no_weight_changes_and_the_tie_stays(model):
    before = sorted(p.data_ptr() for p in model.parameters())
    tied = model.config.tie_word_embeddings
    layout = canonicalize(model, fold=False)
    assert sorted(p.data_ptr() for p in model.parameters()) == before
    assert layout.tied == tied == model.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tie_is_kept_through_a_matrix_or_separated(family, dtype):
    model = tiny(family, tie_word_embeddings=True).to(dtype)
    kept, parted = copy.deepcopy(model), copy.deepcopy(model)
    assert canonicalize(kept, fold=True, tie="keep").tied
    assert kept.get_output_embeddings().weight is kept.get_input_embeddings().weight
    assert kept.config.tie_word_embeddings
    mix = kept.model.norm[1].weight
    assert torch.equal(mix, torch.diag(model.model.norm.weight))
    assert not canonicalize(parted, fold=True, tie="untie").tied
    assert parted.get_output_embeddings().weight is not parted.get_input_embeddings().weight
    assert not parted.config.tie_word_embeddings
    assert torch.equal(parted.get_input_embeddings().weight, model.get_input_embeddings().weight)
    head = parted.get_output_embeddings().weight
    assert stored(parted) - stored(kept) == head.numel() - mix.numel()
    assert {p.dtype for p in kept.parameters()} == {p.dtype for p in parted.parameters()} == {dtype}


@pytest.mark.parametrize("family", ["opt", "phi"])
def test_a_tie_under_layernorm_cannot_be_kept_and_says_so(family):
    model = tiny(family, tie_word_embeddings=True)
    before = logits(verify.exact_copy(model), tokens())
    with pytest.raises(InputError, match=f"tie: keep.*'{family}'.*tie: untie"):
        canonicalize(model, fold=True, tie="keep")
    with pytest.raises(InputError, match="tie: keep"):
        verify.certify(model, {}, tokens(), fold=True, tie="keep")
    after, layout = (
        logits(verify.exact_copy(model), tokens()),
        canonicalize(model, fold=True, tie="untie"),
    )
    assert relative_error(before, after) <= tolerance(torch.float32, layout.depth)
    canonicalize(tiny(family), fold=True, tie="keep")  # an untied head has no tie to lose


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_folding_is_done_in_float64_and_cast_once(family):
    model = tiny(family, num_hidden_layers=1)
    exact, _ = canonical_copy(model, fold=True, tie="untie")
    canonicalize(model, fold=True)
    rounded = {n: p.float() for n, p in exact.named_parameters()}
    if family == "llama":  # one product per weight: the nearest float32 of it, bit for bit
        assert all(torch.equal(p, rounded[n]) for n, p in model.named_parameters())
    for name, p in model.named_parameters():
        assert relative_error(exact.get_parameter(name), p) <= tolerance(torch.float32, 0)
