"""What gradients foretell of changes: against the model that is changed a little, against measured KL, and in reports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from folders import VOCABULARY, model_of
from sliced import data as data
from sliced import recipe, sliced, tokens
from torch import Tensor
from transformers import PreTrainedModel

from invariance.calibrate.backward import sample
from invariance.calibrate.fisher import SEED
from invariance.calibrate.moments import Moment, Moments
from invariance.calibrate.statistic import Statistic
from invariance.compress import predict
from invariance.compress.means import Means
from invariance.compress.pipeline import slice_model
from invariance.compress.planner import plan
from invariance.core.change import Change
from invariance.core.space import Space
from invariance.io.data import Tokens
from invariance.io.memo import Memo
from invariance.method.interfaces import find
from invariance.model.canonical import canonicalize
from invariance.model.copies import copy_in
from invariance.model.layout import Layout
from invariance.model.reparametrize import reparametrize
from invariance.model.verify import logits
from invariance.model.working import Whole

FAMILIES = ["llama", "qwen3", "gemma3_text", "opt", "phi"]


def canonical(
    family: str = "llama", fold: bool = False, split: Sequence[str] = (), **options: Any
) -> tuple[PreTrainedModel, Layout]:
    model = copy_in(torch.float64, model_of(family, **options))
    return model, canonicalize(model, fold=fold, split=split)


def text(sequences: int = 2, length: int = 24, seed: int = 0) -> Tokens:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (sequences, length), generator=g)
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def cut(space: Space) -> Change:
    """A cut to half of the directions, or to one pair and what positions spare, in a basis of no special kind."""
    if space.rotary or space.kind == "heads":
        k = space.spared + 2 if space.rotary else 1
        E = torch.eye(space.dim, dtype=torch.float64)[:, space.kept(k)].repeat(space.copies, 1, 1)
        return Change(E, E)
    whole = Change.rotation(space.element(3))
    return whole.columns(torch.arange(space.dim // 2))


def blended(space: Space, change: Change, share: float) -> Change:
    """A part of the way to a cut: no direction is gone, and readers get x + share · (x' − x)."""
    eye = torch.eye(space.dim, dtype=torch.float64).repeat(space.copies, 1, 1)
    return Change(eye, eye + share * (change.decode.matrix() @ change.encode.matrix().mT - eye))


@contextmanager
def nudged(
    model: PreTrainedModel, layout: Layout, cuts: Mapping[str, Change], share: float
) -> Iterator[PreTrainedModel]:
    """The model a part of the way to some cuts: its weights, and, since norms see what is left, what norms are given."""
    inside = {
        n: blended(layout.spaces[n], c, share)
        for n, c in cuts.items()
        if layout.spaces[n].kind != "residual"
    }
    twin = changed(model, layout, inside)
    norms = {e.source: f"{e.stage}.norm" for e in layout.edges} | {
        layout.points[-1]: layout.architecture.final_norm
    }
    for name in cuts.keys() - inside.keys():
        back = blended(layout.spaces[name], cuts[name], share).decode.matrix()[0]
        twin.get_submodule(norms[name]).register_forward_pre_hook(
            lambda _m, a, back=back: (a[0] @ back.mT, *a[1:])
        )
    yield twin


def changed(
    model: PreTrainedModel, layout: Layout, changes: Mapping[str, Change]
) -> PreTrainedModel:
    twin = copy_in(torch.float64, model)
    reparametrize(twin, layout, changes)
    return twin


def loglikelihood(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    return logits(model, ids)[0].log_softmax(-1).gather(-1, labels[:, None]).sum()


def drawn(model: PreTrainedModel, tokens: Tokens) -> list[Tensor]:
    """The labels of the sequences, as they are drawn in float32."""
    g = torch.Generator().manual_seed(SEED)
    return [
        sample(logits(copy_in(torch.float32, model), row[None])[0].softmax(-1), g)
        for row in tokens.ids
    ]


def cuttable(layout: Layout) -> dict[str, Space]:
    spaces = {n: s for n, s in layout.spaces.items() if not s.normed}
    return spaces if layout.folded else {n: s for n, s in spaces.items() if s.kind != "residual"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["residual", "mlp", "vo", "qk", "heads", "edge", "all"])
def test_gradients_are_the_derivative_on_the_way_to_the_cut(family: str, kind: str) -> None:
    split = ["edge.0.down", "edge.1.q", "edge.1.up"] if kind == "edge" else []
    model, layout = canonical(family, family != "gemma3_text", split)
    chosen = {n: s for n, s in cuttable(layout).items() if kind in (s.kind, "all")}
    if not chosen:
        pytest.skip("this family cuts no such space")
    cuts = {n: cut(space) for n, space in chosen.items()}
    tokens = text()
    found = predict.measure(Whole(model, layout), chosen, tokens)
    step, labels = 1e-5, drawn(model, tokens)
    both = []
    for share in (step, -step):
        with nudged(model, layout, cuts, share) as twin:
            rows = zip(tokens.ids, labels, strict=True)
            both.append(sum(loglikelihood(twin, row[None], y) for row, y in rows))
    expected = (both[0] - both[1]).item() / (2 * step)
    each = [
        (found.gradients[n] * (cuts[n].read(s, found.signals[n]) - found.signals[n])).sum().item()
        for n, s in chosen.items()
    ]
    scale = sum(abs(x) for x in each)
    assert sum(each) == pytest.approx(expected, abs=2e-3 * scale)
    assert abs(expected) > 5e-3 * scale  # the control: neither is nothing
    along = sum(
        (
            found.gradients[n].double()
            * (cuts[n].read(s, found.signals[n].double()) - found.signals[n].double())
        ).sum(-1)
        for n, s in chosen.items()
    )
    assert found.loss(cuts) == pytest.approx(along.square().mean().item() / 2, rel=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "vo", "heads", "residual"])
def test_half_the_mean_square_is_the_kl_of_a_small_step(kind: str) -> None:
    model, layout = canonical(fold=True)
    last = [n for n, s in layout.spaces.items() if s.kind == kind][
        -1
    ]  # errors there move the logits of their own token alone
    cuts, tokens = {last: cut(layout.spaces[last])}, text(2, 300)
    with nudged(model, layout, cuts, 0.03) as twin:
        p, q = (
            torch.cat([logits(m, row[None])[0] for row in tokens.ids]).log_softmax(-1)
            for m in (model, twin)
        )
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    predicted = 0.03**2 * predict.measure(Whole(model, layout), [last], tokens).loss(cuts)
    assert kl == pytest.approx(predicted, rel=0.3)  # of 600 labels
    assert kl != pytest.approx(2 * predicted, rel=0.3)  # the control: without the half


@pytest.mark.parametrize("cutter", ["least_squares", "bias_compensation", "truncate"])
@pytest.mark.parametrize("kind", ["mlp", "vo", "heads"])
def test_what_readers_get_is_what_the_changed_weights_compute(kind: str, cutter: str) -> None:
    model, layout = canonical(num_attention_heads=8)
    name = f"{kind}.1"
    space, g = layout.spaces[name], torch.Generator().manual_seed(1)
    seen = space.copies * space.seen
    reader = {"mlp": "mlp.down", "vo": "attention.out", "heads": "attention.out"}[kind]
    (path,) = [
        n for n, _ in model.named_modules() if n.startswith("model.layers.1") and n.endswith(reader)
    ]
    W = model.get_parameter(f"{path}.weight").detach()
    heads = W.shape[1] // seen
    x = torch.randn(50, W.shape[1], generator=g, dtype=torch.float64) + 0.5
    runs = x.reshape(50, space.copies, heads, space.seen)
    second = torch.einsum("ncrd,ncre->cde", runs, runs) / (50 * heads)
    known = {Statistic(s): Moment(second, 1.0) for s in ("raw", "weighted", "seen")}
    moments = Moments(
        {(name, s): m for s, m in known.items()}
        | {(name, Statistic("mean")): Moment(runs.mean((0, 2)), 1.0)}
    )
    basis = find("rotate", "identity")().fit(space, Moments())
    k = space.dim // 2
    change = find("slice", cutter)().cut(space, basis, k, moments)
    twin = changed(model, layout, {name: change})
    E = change.encode.matrix()
    small = torch.einsum(
        "ncrdg,cdk->ncrkg", runs.reshape(50, space.copies, heads, space.dim, space.grain), E
    )
    y = twin.get_submodule(path)(small.reshape(50, -1))
    assert torch.allclose(y, change.read(space, x) @ W.mT, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(y, x @ W.mT, rtol=1e-2, atol=1e-2)  # the control


def test_tokens_that_are_left_out_or_padding_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout = canonical()
    tokens = text(2, 12)
    whole = predict.measure(Whole(model, layout), ["mlp.0"], tokens)
    later = predict.measure(Whole(model, layout), ["mlp.0"], tokens, skip=4)
    assert torch.equal(
        later.signals["mlp.0"], whole.signals["mlp.0"].reshape(2, 12, -1)[:, 4:].flatten(0, 1)
    )
    assert torch.equal(
        later.gradients["mlp.0"], whole.gradients["mlp.0"].reshape(2, 12, -1)[:, 4:].flatten(0, 1)
    )
    monkeypatch.setattr(predict, "TOKENS", 5)  # of those that are not left out
    five = predict.measure(Whole(model, layout), ["mlp.0"], tokens, skip=4).signals["mlp.0"]
    torch.testing.assert_close(
        five, whole.signals["mlp.0"].reshape(2, 12, -1)[:, 4:9].flatten(0, 1)
    )
    monkeypatch.undo()
    padded = Tokens(
        torch.cat((tokens.ids, torch.ones(2, 3, dtype=torch.long)), 1),
        torch.cat((tokens.mask, torch.zeros(2, 3, dtype=torch.bool)), 1),
    )
    assert predict.measure(Whole(model, layout), ["mlp.0"], padded).signals["mlp.0"].shape[0] == 24


MLP = {
    "spaces": "mlp",
    "rotate": "permute",
    "select": {"uniform": {"width": 48}},
    "slice": "least_squares",
}
STREAM = {"spaces": "residual", "rotate": "pca", "select": {"uniform": {"width": 28}}}
SHORT = {"spaces": ["heads", "mlp"], "select": {"shortgpt": {"blocks": 1}}, "widths": {"min": 0}}
FACTORS = {
    "spaces": "edge",
    "rotate": "weight_svd",
    "select": {"uniform": {"keep": 0.6}},
    "slice": "truncate",
}


@pytest.mark.parametrize("order", ["oneshot", "sequential", "dense_target"])
@pytest.mark.parametrize(
    "step", [MLP, STREAM, SHORT, FACTORS], ids=["mlp", "stream", "depth", "factors"]
)
def test_every_plan_predicts(step: dict[str, Any], order: str) -> None:
    if step is FACTORS and order == "dense_target":
        pytest.skip("refused: it refits whole matrices")
    found = sliced(recipe(step, order=order))
    assert (
        found.foretold.loss is not None
        and found.foretold.loss > 0
        and found.foretold.by == "gradients"
    )
    assert "predict" in found.seconds


def test_what_is_cut_more_is_predicted_to_lose_more() -> None:
    losses = [
        sliced(recipe(MLP | {"select": {"uniform": {"width": k}}})).foretold.loss
        for k in (64, 56, 40, 16)
    ]
    assert losses[0] == 0 and losses == sorted(losses)  # type: ignore[type-var]


def test_members_of_a_family_are_predicted_one_by_one() -> None:
    family = recipe(
        MLP | {"select": "uniform", "slice": "truncate"},
        budget={"parameters": 0.9},
        nested=[0.8, 0.7],
    )
    found = sliced(family)
    assert (
        found.foretold.loss is not None
        and found.members[0.8].loss is not None
        and found.members[0.7].loss is not None
    )
    assert found.foretold.loss < found.members[0.8].loss < found.members[0.7].loss
    alone = recipe(MLP | {"select": "uniform", "slice": "truncate"}, budget={"parameters": 0.7})
    assert sliced(alone).foretold.loss == pytest.approx(found.members[0.7].loss, rel=1e-6)


def test_runs_on_one_model_measure_gradients_once() -> None:
    memo, model = Memo(), model_of("llama")
    first, second = (recipe(MLP | {"select": {"uniform": {"width": k}}}) for k in (48, 40))
    losses = [
        slice_model(model, plan(r, model.config), tokens(), Means(memo=memo)).foretold.loss
        for r in (first, second)
    ]
    assert sum(key[0] == "gradients" for key in memo.computed if isinstance(key, tuple)) == 1
    assert losses == [sliced(first, model).foretold.loss, sliced(second, model).foretold.loss]


def test_runs_that_leave_out_other_tokens_measure_them_again() -> None:
    memo, model = Memo(), model_of("llama")
    for skip in (0, 3):
        found = recipe(MLP, calibrate={"skip": skip})
        slice_model(model, plan(found, model.config), tokens(), Means(memo=memo))
    assert sum(key[0] == "gradients" for key in memo.computed if isinstance(key, tuple)) == 2


def test_branches_that_go_count_whatever_is_done_to_the_rest() -> None:
    model = model_of("llama", num_hidden_layers=4)
    whole = {
        "spaces": "mlp",
        "rotate": "permute",
        "select": {"uniform": {"keep": 1.0}},
        "slice": "truncate",
    }
    values = {"spaces": "vo", "rotate": "head_svd", "select": {"uniform": {"width": 6}}}
    alone, beside, cut = (
        sliced(recipe(SHORT, *more), model).foretold for more in ((), (whole,), (values,))
    )
    assert (
        alone.loss == pytest.approx(beside.loss, rel=1e-6) and alone.by == beside.by == "gradients"
    )
    assert (
        cut.loss is not None
        and alone.loss is not None
        and cut.loss != pytest.approx(alone.loss, rel=1e-3)
    )


def test_what_lies_in_a_branch_that_goes_is_not_counted_again() -> None:
    model, layout = canonical()
    names = ["heads.1", "vo.1", "qk.1"]
    found = predict.measure(Whole(model, layout), names, text())
    gone = {"heads.1": Change.empty(layout.spaces["heads.1"], 0)}
    inside = {n: cut(layout.spaces[n]) for n in names[1:]}
    assert found.loss(gone | inside) == found.loss(gone) != found.loss(inside) > 0


def test_a_family_whose_widest_member_is_whole_predicts_the_others() -> None:
    steps = MLP | {"select": "uniform", "slice": "truncate"}
    found = sliced(recipe(steps, budget={"parameters": 1.0}, nested=[0.8, 0.7]))
    assert found.foretold == (0.0, None)
    assert (
        found.members[0.8].by == "gradients"
        and 0 < found.members[0.8].loss < found.members[0.7].loss
    )


def test_sequences_without_a_token_that_counts_are_passed_over() -> None:
    model, layout = canonical()
    some = text(4, 12)
    some.mask[:2, 3:] = False
    found = predict.measure(Whole(model, layout), ["mlp.0"], some, skip=3)
    later = predict.measure(
        Whole(model, layout), ["mlp.0"], Tokens(some.ids[2:], some.mask[2:]), skip=3
    )
    assert (
        torch.equal(found.signals["mlp.0"], later.signals["mlp.0"])
        and len(found.signals["mlp.0"]) == 18
    )
    nothing = predict.measure(Whole(model, layout), ["mlp.0"], some, skip=12)
    assert math.isnan(nothing.loss({"mlp.0": cut(layout.spaces["mlp.0"])}))


def test_without_tokens_nothing_is_predicted() -> None:
    model = model_of("llama")
    step = {
        "spaces": "mlp",
        "rotate": "identity",
        "select": {"uniform": {"width": 40}},
        "slice": "truncate",
    }
    assert slice_model(model, plan(recipe(step), model.config), None).foretold.loss is None


def test_what_overflows_predicts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict.Lost, "nats", float("inf"))
    assert sliced(recipe(MLP)).foretold.loss is None
