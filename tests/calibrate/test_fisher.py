"""The output-KL Fisher against exact derivatives, against measured KL, and where it must come out the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from einops import einsum, rearrange
from folders import VOCABULARY, model_of, save_tokens
from tiny import canonical_copy
from torch import Tensor
from transformers import PreTrainedModel

from invariance.calibrate import backward, fisher
from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.compress.means import Means
from invariance.compress.pipeline import slice_model
from invariance.compress.planner import plan
from invariance.io.data import Tokens, load_tokens
from invariance.model.copies import copy_in
from invariance.model.layout import Layout
from invariance.model.verify import exact_copy, tolerance
from invariance.model.working import Whole
from invariance.recipe.recipe import Recipe

FISHER = Statistic.FISHER
IDS = torch.tensor([[3, 9, 4, 22, 17]])
FLOAT32 = tolerance(torch.float32, 4)


def tokens(ids: Tensor, copies: int = 1) -> Tokens:
    ids = ids.repeat(copies, 1)
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def close(one: Tensor, other: Tensor, bound: float = FLOAT32) -> bool:
    return bool((one - other).norm() <= bound * other.norm())


def behind(model: PreTrainedModel, layout: Layout, point: str, x: Tensor) -> Tensor:
    """The logits with x in place of what arrives at a point of the stream."""
    reader = {e.source: e.stage for e in layout.edges}.get(point, layout.architecture.final_norm)
    handle = model.get_submodule(reader).register_forward_pre_hook(lambda _, args: (x, *args[1:]))
    try:
        return model(input_ids=IDS.expand(len(x), -1), use_cache=False).logits
    finally:
        handle.remove()


def arriving(model: PreTrainedModel, layout: Layout, point: str) -> Tensor:
    found = []
    reader = {e.source: e.stage for e in layout.edges}.get(point, layout.architecture.final_norm)
    handle = model.get_submodule(reader).register_forward_pre_hook(
        lambda _, args: found.append(args[0])
    )
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    handle.remove()
    return found[0]


def exact(model: PreTrainedModel, layout: Layout, point: str) -> Tensor:
    """Mean over t of Σ_s J_stᵀ (diag p_s − p_s p_sᵀ) J_st."""
    x = arriving(model, layout, point)
    J = torch.autograd.functional.jacobian(lambda x: behind(model, layout, point, x)[0], x)[:, :, 0]
    p = behind(model, layout, point, x)[0].detach().softmax(-1)
    curvature = torch.diag_embed(p) - einsum(p, p, "s v, s w -> s v w")
    return einsum(J, curvature, J, "s v t d, s v w, s w t e -> d e") / IDS.shape[1]


@pytest.fixture(scope="module")
def many() -> tuple[PreTrainedModel, Layout, Moments]:
    """Very many draws of labels for one short sequence."""
    model, layout = canonical_copy(model_of("llama"), fold=True, tie="untie")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fisher, "SEQUENCES", 1500)
        batches = Tokens.batches
        patch.setattr(
            Tokens, "batches", lambda self, size: batches(self, 500)
        )  # one by one takes minutes
        return model, layout, fisher.measure(Whole(model, layout), layout.points, tokens(IDS, 1500))


def spread(model: PreTrainedModel, layout: Layout, point: str, draws: int) -> float:
    """The standard error of a mean of so many draws, in the Frobenius norm."""
    single = [
        fisher.measure(Whole(model, layout), [point], tokens(IDS), seed=s).known[point, FISHER].mean
        for s in range(40)
    ]
    return (torch.stack(single) - torch.stack(single).mean(0)).square().sum(
        (1, 2, 3)
    ).mean().sqrt().item() / draws**0.5


@pytest.mark.parametrize("point", ["x.0.0", "x.1.0", "x.2.0"])
def test_sampled_labels_give_the_fisher_of_exact_derivatives(many: Any, point: str) -> None:
    model, layout, found = many
    F, expected = found.known[point, FISHER].mean[0], exact(model, layout, point)
    assert (F - expected).norm() <= 4 * spread(model, layout, point, 1500)
    assert (F - expected).norm() <= 0.25 * expected.norm()


def test_the_likeliest_label_in_place_of_a_sampled_one_is_caught(
    monkeypatch: pytest.MonkeyPatch, many: Any
) -> None:
    model, layout, _ = many
    monkeypatch.setattr(backward, "sample", lambda logits, g: logits.argmax(-1))
    F = fisher.measure(Whole(model, layout), ["x.1.0"], tokens(IDS)).known["x.1.0", FISHER].mean[0]
    expected = exact(model, layout, "x.1.0")
    assert (F - expected).norm() > 0.25 * expected.norm()


@pytest.mark.parametrize("point", ["x.0.1", "x.2.0"])
def test_half_the_fisher_is_the_kl_per_token_of_small_errors(many: Any, point: str) -> None:
    model, layout, found = many
    x = arriving(model, layout, point)
    g = torch.Generator().manual_seed(2)
    scale = (
        torch.rand(x.shape[-1], generator=g).double().pow(2)
    )  # some directions err more than others
    e = 1e-3 * scale * torch.randn(4000, *x.shape[1:], generator=g, dtype=torch.float64)
    with torch.no_grad():
        before = behind(model, layout, point, x).log_softmax(-1)
        after = behind(model, layout, point, x + e).log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).mean().item()
    predicted = (
        found.known[point, FISHER].mean[0].diagonal() * (1e-3 * scale).square()
    ).sum().item() / 2
    assert kl == pytest.approx(predicted, rel=0.1)
    assert kl != pytest.approx(2 * predicted, rel=0.1)  # the control: without the half


@pytest.mark.parametrize("family", ["llama", "opt", "phi", "gemma3_text"])
def test_a_space_inside_a_stage_gets_its_own_gradients_moment(family: str) -> None:
    """F_h = Wᵀ F W is E of the outer product of the gradient by h itself, for the same labels."""
    model, layout = canonical_copy(model_of(family), fold=True, tie="untie")
    twin = copy_in(torch.float32, model).requires_grad_(False)
    names = layout.select(["mlp", "vo"])
    found = fisher.measure(
        Whole(model, layout), [p for n in names for p in layout.written_behind(n)], tokens(IDS)
    )
    for name in names:
        space = layout.spaces[name]
        ((weight, _),) = layout.readers(name)
        kept: list[Tensor] = []

        def keep(_: Any, args: Any, kept: list[Tensor] = kept) -> tuple[Tensor]:
            kept.append(args[0].detach().requires_grad_())
            return (kept[-1],)

        handle = twin.get_submodule(weight.removesuffix(".weight")).register_forward_pre_hook(keep)
        logits = twin(input_ids=IDS, use_cache=False).logits[0]
        handle.remove()
        labels = backward.sample(
            logits.detach().softmax(-1), torch.Generator().manual_seed(fisher.SEED)
        )
        likelihood = logits.log_softmax(-1)[range(len(labels)), labels].sum()
        (gradient,) = torch.autograd.grad(likelihood, kept)
        runs = rearrange(gradient.double(), "1 t (c r d) -> c (t r) d", c=space.copies, d=space.dim)
        expected = (
            runs.mT @ runs / runs.shape[1]
        )  # over tokens, and over the heads that share a copy
        F = fisher.moment(Whole(model, layout), space, found).mean
        assert close(F, expected)
        assert not close(F, expected.flip(-1), 0.1)  # the control: channels mixed up
    assert layout.written_behind("qk.0") == []


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_queries_without_some_dims_cost_what_taylor_says(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """½ ε² Σ_S M is the KL, summed over positions, of scaling the dims S of one token's queries by 1 − ε, mean over
    the tokens; without what two dims do together it is another number."""
    model, layout = canonical_copy(model_of(family), fold=True, tie="untie")
    space, draws, eps = layout.spaces["qk.0"], 1500, 1e-3
    monkeypatch.setattr(fisher, "SEQUENCES", draws)
    batches = Tokens.batches
    monkeypatch.setattr(Tokens, "batches", lambda self, size: batches(self, 500))
    found = fisher.measure(Whole(model, layout), [], tokens(IDS, draws), queries=["qk.0"])
    M = found.known["qk.0", Statistic.TAYLOR].mean
    assert M.shape == (space.copies, space.dim, space.dim)
    S = torch.arange(0, space.dim, 2)
    q = model.get_submodule(f"{layout.attention('qk.0')}.q")

    def predictions(token: int | None) -> Tensor:
        def scale(_m: Any, _a: Any, out: Tensor) -> Tensor:
            out = out.clone()
            runs = out.unflatten(-1, (space.copies, -1, space.dim))  # a view
            runs[:, token, 0, :, S] *= 1 - eps
            return out

        handle = None if token is None else q.register_forward_hook(scale)
        with torch.no_grad():
            found = model(input_ids=IDS, use_cache=False).logits[0].log_softmax(-1)
        if handle is not None:
            handle.remove()
        return found

    before = predictions(None)
    kl = [(before.exp() * (before - predictions(t))).sum().item() for t in range(IDS.shape[1])]
    measured = sum(kl) / len(kl)
    block = M[0][S][:, S]
    assert measured == pytest.approx(eps**2 * block.sum().item() / 2, rel=0.25)
    assert measured != pytest.approx(
        eps**2 * block.sum().item(), rel=0.25
    )  # the control: without the half


def test_padding_counts_for_nothing() -> None:
    model, layout = canonical_copy(model_of("llama"), fold=True, tie="untie")
    ids = torch.cat([IDS, torch.full((1, 4), 7)], 1)
    mask = torch.arange(9)[None] < 5
    padded = fisher.measure(Whole(model, layout), layout.points, Tokens(ids, mask))
    plain = fisher.measure(Whole(model, layout), layout.points, tokens(IDS))
    unmasked = fisher.measure(Whole(model, layout), layout.points, tokens(ids))
    for key, moment in plain.known.items():
        assert padded.known[key].count == moment.count == 5
        assert close(padded.known[key].total, moment.total)
        assert not close(unmasked.known[key].total, moment.total, 0.01)  # the control


def test_folding_the_norms_leaves_the_fisher_of_the_stream() -> None:
    model = model_of("llama")
    (one, folded), (other, unfolded) = (
        canonical_copy(model, fold=f, tie="untie") for f in (True, False)
    )
    here = fisher.measure(Whole(one, folded), folded.points, tokens(IDS))
    there = fisher.measure(Whole(other, unfolded), unfolded.points, tokens(IDS))
    for key, moment in here.known.items():
        assert close(moment.total, there.known[key].total)


def test_measuring_leaves_the_model_and_its_gradients_alone() -> None:
    model = exact_copy(model_of("llama"))
    _, layout = canonical_copy(model_of("llama"), fold=False, tie="untie")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = fisher.measure(Whole(model, layout), ["x.1.0"], tokens(IDS))
    assert (
        set(found.known) == {("x.1.0", FISHER)}
        and not found.known["x.1.0", FISHER].total.requires_grad
    )
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_labels_follow_the_prediction() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    labels = backward.sample(p.expand(20000, -1), torch.Generator().manual_seed(0))
    share = labels.bincount(minlength=6) / 20000
    assert bool((share[p == 0] == 0).all())  # what cannot be is never drawn
    assert bool(((share - p).abs() <= 4 * (p * (1 - p) / 20000).sqrt()).all())


# Runs


def test_so_many_sequences_are_read_as_are_asked_for_and_the_first_of_them() -> None:
    model, layout = canonical_copy(model_of("llama"), fold=True, tie="untie")
    ids = torch.arange(60).reshape(12, 5) % VOCABULARY

    def of(found: Tokens, **options: Any) -> Tensor:
        measured = fisher.measure(Whole(model, layout), ["x.1.0"], found, **options)
        return measured.known["x.1.0", FISHER].mean

    few = of(tokens(ids), part=fisher.Part(sequences=3))
    assert torch.equal(few, of(tokens(ids[:3])))
    assert torch.equal(of(tokens(ids)), of(tokens(ids[: fisher.SEQUENCES])))
    assert not close(few, of(tokens(ids)))


@pytest.mark.parametrize("order", ["oneshot", "sequential", "dense_target"])
def test_a_run_measures_the_dense_model_once_and_the_store_keeps_it(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [
        {
            "spaces": "residual",
            "rotate": {"output_aware": {"of": "normed"}},
            "select": {"uniform": {"width": 28}},
        },
        {
            "spaces": "mlp",
            "rotate": {"obs": {"metric": "fisher"}},
            "select": {"uniform": {"width": 50}},
            "slice": "least_squares",
        },
        {
            "spaces": "vo",
            "rotate": {"permute": {"metric": "fisher"}},
            "select": {"uniform": {"width": 6}},
        },
        {
            "spaces": "qk",
            "rotate": {"rope_pairs": {"metric": "fisher"}},
            "select": {"uniform": {"width": 4}},
        },
    ]
    data = str(save_tokens(tmp_path / "tokens.npy"))
    calibrate = {"data": data, "dtype": "float32"}
    recipe = Recipe.from_dict(
        {"model": "m", "calibrate": calibrate, "order": order, "steps": steps}
    )
    model = model_of("llama")
    chart = plan(recipe, model.config)
    assert set(chart.fisher_points) == set(chart.layout.points)
    calls: list[tuple[list[str], list[str]]] = []
    measure = fisher.measure

    def counted(
        parts: Any, points: list[str], *rest: Any, queries: list[str], **options: Any
    ) -> Moments:
        calls.append((points, queries))
        return measure(parts, points, *rest, queries=queries, **options)

    monkeypatch.setattr(fisher, "measure", counted)
    text = load_tokens(data, None, vocab_size=VOCABULARY)
    first = slice_model(model, chart, text, Means(tmp_path / "store"))
    again = slice_model(model, chart, text, Means(tmp_path / "store"))
    assert calls == [(chart.fisher_points, ["qk.0", "qk.1"])]
    assert first.certificate.passed
    for name, p in first.model.named_parameters():
        assert torch.equal(p, again.model.get_parameter(name))


def test_only_what_methods_ask_for_is_measured() -> None:
    step = {"spaces": "mlp.0", "rotate": {"permute": {"metric": "fisher"}}}
    recipe = Recipe.from_dict({"model": "m", "calibrate": {"data": "d"}, "steps": [step]})
    assert plan(recipe, model_of("llama").config).fisher_points == ["x.1.0"]
    other = Recipe.from_dict(
        {"model": "m", "calibrate": {"data": "d"}, "steps": [step | {"rotate": "permute"}]}
    )
    assert plan(other, model_of("llama").config).fisher_points == []
