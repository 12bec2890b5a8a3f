"""Nested members trained together: each runs on parts of one model's weights, and they stay parts of one another."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import VOCABULARY, invoke, model_of, save_model, save_tokens
from tiny import canonical_copy, elements, rotations, segments, share
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from invariance.compress.nested import first
from invariance.core.errors import InputError
from invariance.core.space import columns
from invariance.io.data import Tokens, load_tokens
from invariance.measure.evaluate import perplexity
from invariance.model.copies import copy_in
from invariance.model.labels import label
from invariance.model.layout import Layout
from invariance.model.reparametrize import reparametrize
from invariance.model.verify import logits, relative_error, tolerance
from invariance.recipe.recipe import parse_recipe
from invariance.recipe.recover import Recover
from invariance.recover import module as recover_module
from invariance.recover.adapt import adapt, settle
from invariance.recover.module import HELD_OUT, next_token_loss, of_member
from invariance.recover.nested import Member, sandwich
from invariance.recover.recover import Recovered, put_back, recover
from invariance.recover.training import Restructured, Training

F32 = torch.float32
MEMBERS: dict[str, dict[str, int]] = {
    "0.9": {},
    "0.6": {"mlp.0": 40, "mlp.1": 48},
    "0.5": {"mlp.0": 20, "mlp.1": 16},  # one of the two between is drawn at every step
    "0.4": {"mlp.0": 6, "mlp.1": 4},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_tokens(tmp_path / "tokens.npy", sequences=24)
    yield tmp_path


def tokens() -> Tokens:
    return load_tokens("tokens.npy", None, vocab_size=VOCABULARY)


def options(**keys: Any) -> Recover:
    quick = {"held_out": 4, "batch": 2, "checks": 2, "learning_rate": 1e-2, "nested": True}
    return Recover.model_validate(quick | keys)


def train(model: PreTrainedModel, asked: Recover, name: str = "", seed: int = 0) -> Recovered:
    cut = Restructured(model, nested=MEMBERS)
    return recover(cut, None, tokens(), Training(asked, seed), identity={"test": name})


def rotated(family: str, fold: bool, by: str = "all") -> tuple[PreTrainedModel, Layout]:
    """A model whose spaces all have other bases, and its layout."""
    model, layout = canonical_copy(model_of(family), fold, "untie")
    names = [n for n, s in layout.spaces.items() if fold or s.kind != "residual"]
    reparametrize(model, layout, rotations(share(elements(layout, names, 3), segments(layout, by))))
    return model, label(model)


def narrower(layout: Layout, fold: bool) -> dict[str, int]:
    """A width below that of every space that can be cut; one MLP goes altogether."""
    found = {}
    for name, space in layout.spaces.items():
        if space.kind == "residual":
            found |= {name: 24} if fold else {}
        elif space.kind == "qk":
            found |= (
                {name: len(columns(space.rotary, space.rotary // 4, space.spared))}
                if space.rotary
                else {name: 5}
            )
        else:
            found[name] = space.dim // 2
    return found | {"mlp.1": 0}


def shaken(student: PreTrainedModel) -> None:
    """Something learned."""
    g = torch.Generator().manual_seed(1)
    for p in student.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn(p.shape, generator=g) * max(p.data.std().item(), 0.3)


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
@pytest.mark.parametrize("kind", ["lora", "full", "norms"])
@pytest.mark.parametrize("fold", [True, False])
def test_a_member_under_training_is_the_one_that_is_cut_from_what_was_trained(
    family: str, kind: str, fold: bool
) -> None:
    model, layout = rotated(family, fold)
    widths, asked, ids = narrower(layout, fold), options(weights=kind), tokens().ids[:2]
    student = copy_in(F32, model)
    member = Member(student, layout, widths).eval()
    member.adapt(asked, 0)
    adapt(student, layout, asked, 0)
    before = member(student, input_ids=ids, use_cache=False).logits
    shaken(student)
    found = member(student, input_ids=ids, use_cache=False).logits
    put_back(model, settle(student, layout, asked))
    reparametrize(model, layout, first(layout, widths))
    bound = tolerance(F32, layout.depth)
    assert relative_error(logits(model, ids), found) <= bound
    assert relative_error(logits(model, ids), before) > 100 * bound  # had nothing been learned


@pytest.mark.parametrize("by", ["block", "stage"])
def test_members_have_their_part_of_the_shortcuts(by: str) -> None:
    model, layout = rotated("llama", True, by)
    ids, widths = tokens().ids[:2], {p: 20 + 2 * n for n, p in enumerate(layout.points)}
    assert layout.shortcuts
    student = copy_in(F32, model)
    member = Member(student, layout, widths)
    member.adapt(options(weights="full"), 0)
    reparametrize(model, layout, first(layout, widths))
    found = member(student, input_ids=ids, use_cache=False).logits
    assert relative_error(logits(model, ids), found) <= tolerance(F32, layout.depth)


def test_where_bases_are_one_and_widths_differ_a_member_has_constant_shortcuts() -> None:
    model, layout = canonical_copy(model_of("llama"), True, "untie")
    ids, widths = tokens().ids[:2], {p: 32 - 4 * n for n, p in enumerate(layout.points)}
    student = copy_in(F32, model)
    member = Member(student, layout, widths)
    member.adapt(options(weights="full"), 0)
    assert not layout.shortcuts and member.layout.shortcuts
    reparametrize(model, layout, first(layout, widths))
    found = member(student, input_ids=ids, use_cache=False).logits
    assert relative_error(logits(model, ids), found) <= tolerance(F32, layout.depth)


@pytest.mark.parametrize("fold", [True, False])
def test_the_shared_weights_get_the_members_gradient_and_what_it_has_not_gets_none(
    fold: bool,
) -> None:
    model, layout = rotated("llama", fold)
    widths, some = narrower(layout, fold), tokens()
    student = copy_in(F32, model).requires_grad_(False)
    member = Member(student, layout, widths)
    alone = copy_in(F32, member.twin).requires_grad_(True)
    member.adapt(options(weights="full"), 0)
    student.requires_grad_(True)
    for run in (lambda **i: member(student, **i), alone):
        out = run(input_ids=some.ids[:4], use_cache=False).logits
        next_token_loss(out, some.ids[:4], some.mask[:4]).backward()
    assert not any(p.requires_grad for p in member.parameters())
    theirs = dict(alone.named_parameters())
    for name, p in student.named_parameters():
        if name not in theirs:
            assert p.grad is None or not p.grad.any(), name
            continue
        grad, cut = p.grad, p.detach()
        assert grad is not None
        outside = torch.ones_like(grad)
        index = [
            torch.arange(n) if kept is None else kept
            for n, kept in zip(p.shape, member.parts[name], strict=True)
        ]
        grad, cut = (t[torch.meshgrid(*index, indexing="ij")] for t in (grad, cut))
        outside[torch.meshgrid(*index, indexing="ij")] = 0
        assert torch.equal(cut, theirs[name]) and not (p.grad * outside).any()  # type: ignore[operator]
        assert relative_error(theirs[name].grad, grad) <= 10 * tolerance(F32, 2 * layout.depth), (
            name
        )  # type: ignore[arg-type]


def test_a_step_trains_the_widest_the_narrowest_and_each_between_in_turn() -> None:
    assert [sandwich(n, 0) for n in (1, 2)] == [[0], [0, 1]]
    drawn = [sandwich(5, seed) for seed in range(60)]
    assert drawn == [sandwich(5, seed) for seed in range(60)]
    assert all((a, c) == (0, 4) for a, _, c in drawn) and {b for _, b, _ in drawn} == {1, 2, 3}


def held_out(model: PreTrainedModel) -> dict[str, float]:
    """The perplexity of every member, cut from a model, on the windows that are held out."""
    held, found = Tokens(tokens().ids[-4:], tokens().mask[-4:]), {}
    for name, widths in MEMBERS.items():
        twin = copy_in(F32, model)
        layout = label(twin)
        reparametrize(twin, layout, first(layout, widths))
        found[name] = perplexity(twin, held)
    return found


def test_trained_together_narrow_members_are_better_than_those_of_a_model_trained_alone() -> None:
    keys: dict[str, Any] = {"weights": "full", "epochs": 4, "learning_rate": 3e-3, "patience": 10}
    models = {on: rotated("llama", False)[0] for on in (True, False)}
    before = held_out(models[True])
    reports = {on: train(m, options(nested=on, **keys), str(on)).report for on, m in models.items()}
    together, alone = (held_out(models[on]) for on in (True, False))
    assert together["0.4"] < alone["0.4"] and together["0.4"] < before["0.4"]
    assert reports[False]["members"] == {} and reports[True]["members"].keys() == MEMBERS.keys()
    rounding = math.log(VOCABULARY) * tolerance(F32, 4)
    for name, told in reports[True]["members"].items():
        assert math.isclose(told["before"], before[name], rel_tol=rounding)
        assert math.isclose(told["after"], together[name], rel_tol=rounding)
    for side, found in (("before", before), ("after", together)):
        mean = math.exp(sum(map(math.log, found.values())) / len(found))
        assert math.isclose(reports[True]["held_out"][side], mean, rel_tol=rounding)


def curve(report: Mapping[str, Any]) -> list[dict[str, float]]:
    return list(report["curve"])


def test_training_that_was_stopped_goes_on_along_the_same_curve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = options(epochs=2, checks=5, lora={"dropout": 0.2})

    def go(name: str, seed: int = 0) -> list[dict[str, float]]:
        return curve(train(rotated("llama", False)[0], asked, name, seed).report)

    whole, other = go("whole"), go("whole", seed=1)
    real = recover_module.Recovery.on_train_batch_end

    def stops(module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 10:
            raise RuntimeError("stopped")
        real(module, outputs, batch, index)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(recover_module.Recovery, "on_train_batch_end", stops)
        go("stopped")
    assert list(Path("cache/recover").glob("*/last.ckpt"))
    assert go("stopped") == whole != other
    assert all(point.keys() == {"step", HELD_OUT, *map(of_member, MEMBERS)} for point in whole)


def test_two_processes_are_one_with_accumulation() -> None:
    keys, precise = {"epochs": 2, "checks": 4}, {"precision": "64-true"}
    both = [
        train(rotated("llama", False)[0], options(**keys, trainer=precise | more), name).report
        for name, more in (
            ("one", {"accumulate_grad_batches": 2}),
            ("two", {"devices": 2, "strategy": "ddp_fork"}),
        )
    ]
    bound = both[0]["steps"] * tolerance(torch.float64, 4)  # what one step may err by, every step
    for one, two in zip(*map(curve, both), strict=True):
        assert one["step"] == two["step"]
        assert all(abs(one[k] - two[k]) <= bound * one[k] for k in one if k != "step")
    apart = [point[HELD_OUT] for point in curve(both[0])]
    assert all(abs(a - b) > 1000 * bound for a, b in pairwise(apart))


RECIPE = """\
model: dense
calibrate: {data: tokens.npy, dtype: float32}
budget: {parameters: 0.9}
nested: [0.7, 0.5]
steps:
  - {spaces: residual, rotate: pca, select: uniform, widths: {multiple_of: 4}}
  - {spaces: mlp, rotate: permute, select: uniform}
recover: {nested: true, held_out: 4, batch: 2, epochs: 2, loss: {kl: 1, hidden: 1}, learning_rate: 1.0e-2}
evaluate: [{perplexity: {data: tokens.npy, name: tokens}}]
"""


def test_a_recipe_trains_a_family_and_its_members_are_extracted_and_trained_again(
    folder: Path,
) -> None:
    save_model(folder / "dense")
    Path("family.yaml").write_text(RECIPE)

    def document(*arguments: object) -> Any:
        status, out, err = invoke(*arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    report = document("run", "family.yaml", "--output", "family")
    told = report["recover"]["members"]
    assert list(told) == ["0.9", "0.7", "0.5"]
    assert report["recover"]["held_out"]["after"] < report["recover"]["held_out"]["before"]
    more = document(
        "recover",
        "family/model",
        "--output",
        "more",
        "--set",
        "nested=true",
        "--set",
        "weights=full",
        "--set",
        "train.data=tokens.npy",
        "--set",
        "held_out=4",
        "--set",
        "batch=2",
        "--set",
        "learning_rate=1e-9",
    )["recover"]["members"]
    held = Tokens(tokens().ids[-4:], tokens().mask[-4:])
    for share_ in told:
        for where in ("family", "more"):
            document("extract", where, "--width", share_, "-o", f"{where}-{share_}")
        found = AutoModelForCausalLM.from_pretrained(f"family-{share_}/model")
        assert type(found).__module__.startswith("transformers.")
        rounding = math.log(VOCABULARY) * tolerance(F32, 4)
        assert math.isclose(perplexity(found, held), told[share_]["after"], rel_tol=rounding)
        assert math.isclose(more[share_]["before"], told[share_]["after"], rel_tol=rounding)
        card = Path(f"more-{share_}/model/README.md").read_text()
        assert (
            f"| recovered | {more[share_]['after']:.2f} |" in card
            and "AutoModelForCausalLM" in card
        )
        for part in (
            "## What it costs",
            "## Exactness, before it was cut",
            "## Recipe of the slice",
        ):
            assert part in card
    again = document(
        "recover",
        "more-0.5/model",
        "--output",
        "again",
        "--set",
        "train.data=tokens.npy",
        "--set",
        "held_out=4",
        "--set",
        "batch=2",
    )
    assert again["recover"]["members"] == {}
    assert "## Recipe of the slice" in Path("again/model/README.md").read_text()
    member = json.loads(Path("family-0.5/report.json").read_text())["perplexity"]["tokens"]
    assert (
        member["sliced"] is None
        and member["recovered"] == report["nested"][2]["perplexity"]["tokens"]["recovered"]
    )


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("nested: [0.7, 0.5]\n", "", "recover.nested: no members are there to train together"),
        ("nested: true", "nested: true, local: {}", "recover.local: `nested: true` goes without"),
        (
            "nested: true",
            "nested: true, checkpointing: true",
            "recover.checkpointing: `nested: true` goes without",
        ),
        (
            "nested: true",
            "nested: true, trainer: {strategy: fsdp}",
            "'fsdp' gives each process a part",
        ),
    ],
)
def test_what_members_cannot_be_trained_with_is_refused(old: str, new: str, why: str) -> None:
    parse_recipe(RECIPE, "r.yaml")
    with pytest.raises(InputError) as e:
        parse_recipe(RECIPE.replace(old, new), "r.yaml")
    assert why in str(e.value) and str(e.value).startswith("r.yaml:")


def test_one_model_alone_has_no_members_to_train(folder: Path) -> None:
    save_model(folder / "dense")
    status, _, err = invoke(
        "recover",
        "dense",
        "--output",
        "x",
        "--set",
        "nested=true",
        "--set",
        "train.data=tokens.npy",
        "--set",
        "held_out=4",
    )
    assert (
        status == 2
        and "this model is one alone" in " ".join(err.split())
        and not (folder / "x").exists()
    )


def test_tensors_are_told_apart() -> None:
    """The check above that a member's weights are parts of the student's would see another part."""
    model, layout = rotated("llama", False)
    member = Member(copy_in(F32, model), layout, MEMBERS["0.4"])
    name = f"{layout.edges[1].stage}.mlp.down.weight"
    kept: Tensor | None = member.kept[name][1]
    assert kept is not None and torch.equal(kept, torch.arange(6))
    whole = model.get_parameter(name).float()
    assert torch.equal(whole[:, :6], member.twin.get_parameter(name))
    assert not torch.equal(whole[:, 1:7], member.twin.get_parameter(name))
