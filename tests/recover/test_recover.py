"""Recovery: what it trains and puts back, what it trains for, and that it can be stopped, shared out and gone on with."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import VOCABULARY, invoke, model_of, save_model, save_tokens
from safetensors.torch import load_file
from tiny import canonical_copy, rotations, segments, share, stored, weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from invariance.core.errors import InputError, InvarianceError
from invariance.core.progress import quiet
from invariance.io.basis_file import Basis
from invariance.io.data import Tokens, load_tokens
from invariance.measure.evaluate import perplexity
from invariance.model.copies import copy_in
from invariance.model.labels import label
from invariance.model.layout import Layout
from invariance.model.reparametrize import reparametrize
from invariance.model.verify import logits, relative_error, tolerance
from invariance.recipe.recipe import Recipe
from invariance.recipe.recover import Recover
from invariance.recover import module as recover_module
from invariance.recover import teacher
from invariance.recover import trainer as recover_trainer
from invariance.recover.adapt import adapt, adapted, settle
from invariance.recover.local import reconstruct
from invariance.recover.module import HELD_OUT, Order, hidden_loss, kl_loss, next_token_loss, tapped
from invariance.recover.recover import Recovered, recover
from invariance.recover.recover import check as recover_check
from invariance.recover.teacher import Teacher, predictions
from invariance.recover.training import Restructured, Training
from invariance.run.outcome import outcome
from invariance.run.run import run

FAMILIES = ["llama", "opt", "phi"]
RESIDUAL = {"spaces": "residual", "rotate": "pca", "select": {"uniform": {"width": 24}}}
MLP = {
    "spaces": "mlp",
    "rotate": "permute",
    "select": {"uniform": {"width": 40}},
    "slice": "least_squares",
}
F32 = torch.float32


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_tokens(tmp_path / "tokens.npy", sequences=24)
    yield tmp_path


def tokens() -> Tokens:
    return load_tokens("tokens.npy", None, vocab_size=VOCABULARY)


def options(**keys: Any) -> Recover:
    quick = {"held_out": 4, "batch": 2, "checks": 2, "learning_rate": 1e-2}
    return Recover.model_validate(quick | keys)


def restructured(
    family: str = "llama", fold: bool = False, **keys: Any
) -> tuple[PreTrainedModel, Layout]:
    return canonical_copy(model_of(family, **keys), fold, "untie")


def train(
    model: PreTrainedModel,
    asked: Recover,
    dense: PreTrainedModel | None = None,
    basis: Basis | None = None,
    name: str = "",
) -> Recovered:
    cut = Restructured(model, basis)
    return recover(cut, dense, tokens(), Training(asked), identity={"test": name})


# --- What is trained, and how it is put back.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("kind", ["lora", "norms"])
def test_what_was_learned_beside_the_weights_is_merged_exactly(
    family: str, fold: bool, kind: str
) -> None:
    model, layout = restructured(family, fold)
    student = copy_in(F32, model)
    asked = options(weights=kind)
    adapt(student, layout, asked, seed=0)
    g = torch.Generator().manual_seed(1)
    for p in student.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn(p.shape, generator=g)
    ids = tokens().ids[:2]
    learned = logits(student, ids)
    merged = settle(student, layout, asked)
    for name, value in merged.items():
        model.get_parameter(name).data.copy_(value)
    bound = tolerance(F32, layout.depth)
    assert relative_error(learned, logits(model, ids)) <= bound
    assert (
        relative_error(learned, logits(restructured(family, fold)[0], ids)) > 100 * bound
    )  # had it been lost
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in student.named_parameters()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_on_every_matrix_of_the_blocks_and_nothing_else_is_trained(
    family: str,
) -> None:
    model, layout = restructured(family)
    blocks = model.get_submodule(layout.architecture.blocks)
    matrices = {id(m) for m in blocks.modules() if isinstance(m, torch.nn.Linear)}
    assert {id(model.get_submodule(path)) for path in adapted(layout)} == matrices
    adapt(model, layout, options(lora={"rank": 3}), seed=0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(matrices) and all(3 in p.shape for p in trained.values())


def test_gains_and_shortcuts_alone_can_be_trained() -> None:
    model, layout = restructured(fold=True)
    bases = {p: layout.spaces[p].element(3) for p in layout.points}
    reparametrize(model, layout, rotations(bases))
    now = label(model)
    assert now.shortcuts
    adapt(model, now, options(weights="norms"), seed=0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.endswith((".shortcut", ".gain"))}


# --- What it is trained for.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", ["all", "stage"])
def test_the_dense_stream_is_mapped_exactly_into_a_rotated_students_basis(
    family: str, by: str
) -> None:
    model, layout = restructured(family, fold=True)
    bases = share({p: layout.spaces[p].element(5) for p in layout.points}, segments(layout, by))
    reparametrize(model, layout, changes := rotations(bases))
    encode = {p: change.encode.matrix()[0] for p, change in changes.items()}
    ids, mask = tokens().ids[:3], tokens().mask[:3]
    with tapped(model, layout) as found, torch.no_grad():
        model(input_ids=ids)
    master = Teacher.of(model_of(family), Basis.of(layout, encode))
    goal = master.streams(ids, None)
    assert goal.keys() == {"x.1.0", "x.2.0"}
    assert hidden_loss(found, goal, mask).item() <= tolerance(F32, layout.depth) ** 2
    unmapped = Teacher(master.model, master.layout, Basis.of(layout, {})).streams(ids, None)
    assert hidden_loss(found, unmapped, mask).item() > 0.1
    master.check(model, layout)
    with pytest.raises(InputError, match="in this model's basis"):
        Teacher(master.model, master.layout, Basis.of(layout, {})).check(model, layout)


def test_kl_over_all_tokens_is_kl_and_over_fewer_a_lower_bound_that_rises() -> None:
    p, q = (
        model(input_ids=tokens().ids[:2]).logits.detach()
        for model in (model_of("llama"), model_of("llama", seed=1))
    )
    mask = torch.ones(p.shape[:2], dtype=torch.bool)
    logp, logq = p.double().log_softmax(-1), q.double().log_softmax(-1)
    whole = (logp.exp() * (logp - logq)).sum(-1).mean().item()

    def over(k: int, other: Tensor) -> float:
        values, top = p.log_softmax(-1).topk(k, -1)
        return kl_loss(other, top, values, mask).item()

    bound = tolerance(F32, 0) * math.log(VOCABULARY)
    assert abs(over(VOCABULARY, q) - whole) <= bound
    found = [over(k, q) for k in (1, 4, 16, VOCABULARY)]
    assert all(a < b for a, b in pairwise(found))
    assert all(abs(over(k, p)) <= bound for k in (1, 4, VOCABULARY))


def test_the_next_tokens_loss_is_the_logarithm_of_perplexity() -> None:
    model, some = model_of("llama"), tokens()
    loss = next_token_loss(logits(model, some.ids), some.ids, some.mask).item()
    assert math.isclose(loss, math.log(perplexity(model, some)), rel_tol=tolerance(F32, 0))


def test_predictions_of_the_teacher_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = model_of("llama"), []
    real = teacher._predict
    monkeypatch.setattr(teacher, "_predict", lambda *a: asked.append(len(a[1])) or real(*a))
    kept = predictions(model, tokens(), 5, 8, quiet)
    assert sum(asked) == 24 and len(list(kept.folder.iterdir())) == 2
    whole = logits(model, tokens().ids[17:18]).log_softmax(-1).topk(5)
    assert torch.equal(kept.of(17)["top"].long(), whole.indices[0])
    assert relative_error(whole.values[0], kept.of(17)["logp"]) <= tolerance(F32, 4)
    predictions(model, tokens(), 5, 3, quiet)
    assert sum(asked) == 24
    damaged = kept.folder / "000001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    predictions(model, tokens(), 5, 8, quiet)
    assert sum(asked) == 32  # the damaged file's windows alone
    predictions(model_of("llama", seed=1), tokens(), 5, 8, quiet)
    assert sum(asked) == 56


def test_stages_are_trained_towards_the_dense_stream_one_by_one() -> None:
    model, layout = restructured(fold=True)
    changes = rotations(
        share({p: layout.spaces[p].element(5) for p in layout.points}, segments(layout, "stage"))
    )
    reparametrize(model, layout, changes)
    master = Teacher.of(
        model_of("llama"), Basis.of(layout, {p: c.encode.matrix()[0] for p, c in changes.items()})
    )
    student = copy_in(F32, model)
    asked = options(weights="full", local={"sequences": 16}, learning_rate=1e-3)
    exact = reconstruct(
        student, master, label(student), tokens(), options(local={}, learning_rate=1e-9), quiet
    )
    assert (
        max(stage["before"] for stage in exact) <= tolerance(F32, layout.depth) ** 2
    )  # nothing was cut
    for p in student.get_submodule(layout.edges[0].stage).parameters():
        p.data += (
            0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * p.data.std()
        )
    stages = reconstruct(student, master, label(student), tokens(), asked, quiet)
    assert [stage["stage"] for stage in stages] == [e.stage for e in layout.edges]
    assert stages[0]["before"] > 1e-3 and stages[0]["after"] < 0.9 * stages[0]["before"]


# --- Training itself.


def test_every_window_is_seen_once_an_epoch_and_processes_share_them_out() -> None:
    one = list(Order(windows=10, batch=2, batches=10, seed=0))
    assert len(Order(10, 2, 10, 0)) == 10
    for epoch in (one[:5], one[5:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(10))
    assert one[:5] != one[5:]
    assert list(Order(10, 2, 10, 0, start=7)) == one[7:]
    parts = [list(Order(10, 2, 5, 0, rank=r, world=2)) for r in range(2)]
    assert [batch for both in zip(*parts, strict=True) for batch in both] == one


def test_the_best_checkpoint_is_kept_which_may_be_the_first() -> None:
    model, _ = restructured()
    before = weights(model)
    found = train(model, options(learning_rate=3.0, epochs=2, weights="full")).report
    assert found["best_step"] == 0 and found["held_out"]["after"] == found["held_out"]["before"]
    assert all(torch.equal(before[n], p) for n, p in weights(model).items())
    better = train(model, options(epochs=2)).report
    held = Tokens(tokens().ids[-4:], tokens().mask[-4:])
    after = perplexity(model, held)
    assert better["held_out"]["tokens"] == 4 * (held.ids.shape[1] - 1)  # those that are predicted
    assert better["best_step"] > 0 and after < better["held_out"]["before"]
    assert math.isclose(
        after, better["held_out"]["after"], rel_tol=tolerance(F32, 4) * math.log(VOCABULARY)
    )


def test_no_gain_for_a_while_ends_training() -> None:
    found = train(
        restructured()[0], options(learning_rate=0.3, epochs=4, checks=20, patience=2)
    ).report
    assert found["stopped_early"] and found["steps"] < 40


@pytest.mark.parametrize(("checks", "steps"), [(4, [0, 3, 6, 9, 10]), (6, [0, 2, 4, 6, 8, 10])])
def test_held_out_windows_are_measured_no_more_often_than_asked(
    checks: int, steps: list[int]
) -> None:
    found = train(restructured()[0], options(checks=checks, patience=20)).report["curve"]
    assert [point["step"] for point in found] == steps


def test_training_that_diverges_is_told_and_changes_nothing() -> None:
    model, _ = restructured()
    before = weights(model)
    with pytest.raises(InvarianceError, match="learning_rate"):
        train(model, options(weights="full", learning_rate=1e30))
    assert all(torch.equal(before[n], p) for n, p in weights(model).items())


def test_a_budget_of_tokens_is_never_overspent() -> None:
    asked = options(tokens=1000, trainer={"accumulate_grad_batches": 3})
    found = train(restructured()[0], asked).report
    assert found["tokens"] == found["steps"] * 2 * 3 * 16 and 1000 - 96 < found["tokens"] <= 1000
    with pytest.raises(InputError, match="one step takes 32"):
        train(restructured()[0], options(tokens=31))


def test_recomputing_activations_changes_nothing_but_memory() -> None:
    curves = [
        train(
            restructured()[0],
            options(checkpointing=on, loss={"hidden": 1}),
            model_of("llama"),
            Basis.unchanged(restructured()[1]),
        ).report["curve"]
        for on in (False, True)
    ]
    assert same(*curves, bound=10 * tolerance(F32, 4))


def same(one: list[dict[str, float]], other: list[dict[str, float]], bound: float) -> bool:
    pairs = [(a[HELD_OUT], b[HELD_OUT]) for a, b in zip(one, other, strict=True)]
    return [a["step"] for a in one] == [b["step"] for b in other] and all(
        abs(a - b) <= bound * b for a, b in pairs
    )


def test_a_run_that_was_killed_goes_on_along_the_same_curve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = options(
        epochs=2, checks=5, lora={"dropout": 0.2}, loss={"kl": 1.0}, local={"sequences": 4}
    )
    dense, basis = model_of("llama"), Basis.unchanged(restructured()[1])

    def go(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        model, layout = restructured()
        model.get_parameter(
            f"{layout.edges[1].stage}.mlp.down.weight"
        ).data.zero_()  # something to recover
        return train(model, asked, dense, basis, name).report, weights(model)

    whole, learned = go("whole")
    if not (child := os.fork()):
        real = recover_module.Recovery.on_train_batch_end

        def deadly(module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            real(module, outputs, batch, index)

        monkeypatch.setattr(recover_module.Recovery, "on_train_batch_end", deadly)
        go("killed")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (last,) = [
        p
        for p in Path("cache/recover").glob("*/last.ckpt")
        if torch.load(p, weights_only=True)["global_step"] < 20
    ]
    begun = torch.load(last, weights_only=True)["global_step"]
    assert 0 < begun < 10
    seen: list[int] = []
    step = recover_module.Recovery.training_step
    monkeypatch.setattr(
        recover_module.Recovery,
        "training_step",
        lambda m, batch, index: seen.append(index) or step(m, batch, index),
    )
    resumed, again = go("killed")
    assert seen == list(range(begun, 20))
    assert resumed["curve"] == whole["curve"] and resumed["local"] == whole["local"]
    assert all(torch.equal(learned[n], p) for n, p in again.items())


@pytest.mark.parametrize("what", ["calibration", "evaluate"])
def test_a_run_that_was_stopped_resumes_where_it_would_train_the_same_student(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokens(folder / "calibration.npy", seed=1)
    seen: list[int] = []
    real = recover_module.Recovery.on_train_batch_end

    def stopped(module: Any, outputs: Any, batch: Any, index: int) -> None:
        seen.append(index)
        if len(seen) == 8:
            raise KeyboardInterrupt
        real(module, outputs, batch, index)

    monkeypatch.setattr(recover_module.Recovery, "on_train_batch_end", stopped)
    train = {
        "train": {"data": "tokens.npy"},
        "held_out": 4,
        "batch": 2,
        "checks": 2,
        "learning_rate": 1e-2,
    }
    keys: dict[str, Any] = {
        "calibrate": {"data": "calibration.npy", "dtype": "float32"},
        "recover": train,
    }
    with pytest.raises(KeyboardInterrupt):
        outcome(model_of("llama"), recipe(RESIDUAL, **keys), evaluate=False)
    if what == "calibration":
        save_tokens(folder / "calibration.npy", seed=2)
    else:
        keys["evaluate"] = [{"perplexity": {"data": "tokens.npy"}}]
    outcome(model_of("llama"), recipe(RESIDUAL, **keys), evaluate=False)
    assert seen[8] == (0 if what == "calibration" else 5)  # behind the first check


@pytest.mark.parametrize("early", [True, False])
def test_a_run_whose_training_had_ended_is_not_trained_further(
    early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its result was written: also where it was stopped early, with steps left."""
    much = {"weights": "full", "learning_rate": 10.0, "patience": 1} if early else {}
    asked = options(epochs=2, checks=5, **much)
    first, (model, _) = train(restructured()[0], asked, name="ended").report, restructured()
    assert first["stopped_early"] == early
    monkeypatch.setattr(
        recover_module.Recovery, "training_step", lambda *_: pytest.fail("it was trained on")
    )
    assert train(model, asked, name="ended").report == first and first["tokens_per_second"] > 0


def test_two_processes_are_one_with_accumulation() -> None:
    keys = {"epochs": 2, "checks": 4}
    precise = {"precision": "64-true"}
    one = train(
        restructured()[0],
        options(**keys, trainer=precise | {"accumulate_grad_batches": 2}),
        name="one",
    )
    two = train(
        restructured()[0],
        options(**keys, trainer=precise | {"devices": 2, "strategy": "ddp_fork"}),
        name="two",
    )
    half = train(restructured()[0], options(**keys, trainer=precise), name="half")
    bound = one.report["steps"] * tolerance(
        torch.float64, 4
    )  # what one step may err by, every step
    assert same(one.report["curve"], two.report["curve"], bound)
    assert one.report["tokens"] == two.report["tokens"]
    assert not same(one.report["curve"][:2], half.report["curve"][:2], 100 * bound)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss", ["next_token", "kl", "hidden"])
def test_every_loss_trains_every_family(family: str, loss: str) -> None:
    cut = outcome(
        model_of(family),
        recipe(
            RESIDUAL,
            MLP,
            recover={
                "loss": {"next_token": 0.0, loss: 1.0},
                "held_out": 4,
                "batch": 2,
                "checks": 1,
                "learning_rate": 1e-2,
            },
        ),
        evaluate=False,
    )
    assert cut.report["recover"]["steps"] == 10


# --- In a recipe, and alone.


def recipe(*steps: dict[str, Any], **keys: Any) -> Recipe:
    data = {"data": "tokens.npy", "dtype": "float32"}
    return Recipe.from_dict({"model": "m", "calibrate": data, "steps": list(steps)} | keys)


STEPS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "stock": lambda: [RESIDUAL, MLP],
    "ours": lambda: [RESIDUAL | {"segments": "stage"}, MLP],
    "fewer blocks": lambda: [
        {"spaces": ["mlp", "heads"], "widths": {"min": 0}, "select": {"shortgpt": {"blocks": 1}}}
    ],
}


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_a_recipe_recovers_what_it_sliced(kind: str, folder: Path) -> None:
    save_model(folder / "dense")
    keys: dict[str, Any] = {"held_out": 4, "batch": 2, "epochs": 2, "learning_rate": 1e-2}
    asked = [{e: {"data": "tokens.npy"}} for e in ("perplexity", "divergence")]
    made = recipe(*STEPS[kind](), recover=keys, evaluate=asked)
    text = made.to_yaml().replace("model: m", f"model: {folder / 'dense'}")
    (folder / "recipe.yaml").write_text(text)
    report = run(folder / "recipe.yaml", folder / "out", [])
    found, perplexities = report["recover"], report["perplexity"]["tokens.npy"]
    assert report["model"]["stock"] == (kind == "stock")
    alone = outcome(model_of("llama"), made.model_copy(update={"recover": None})).report[
        "perplexity"
    ]
    assert perplexities["sliced"] == alone["tokens.npy"]["sliced"]  # before anything was trained
    divergence = report["divergence"]["tokens.npy"]
    assert (
        divergence["reference"] == "dense"
        and divergence["recovered"]["kl"] != divergence["sliced"]["kl"]
    )
    assert "| recovered |" in (folder / "out/model/README.md").read_text()
    assert perplexities["recovered"] < perplexities["sliced"]
    assert report["seconds"]["recover"] > 0 and found["best_step"] > 0
    model = AutoModelForCausalLM.from_pretrained(folder / "out/model").eval()
    assert stored(model) == report["parameters"]["sliced"]["total"]
    assert math.isclose(perplexity(model, tokens()), perplexities["recovered"], rel_tol=1e-6)
    rows = list(csv.DictReader((folder / "out/recover/csv-0/metrics.csv").open()))
    checks = [float(row[HELD_OUT]) for row in rows if row[HELD_OUT]]
    assert checks == pytest.approx([point[HELD_OUT] for point in found["curve"][1:]])
    assert not list((folder / "cache/recover").iterdir())
    shapes = {n: t.shape for n, t in load_file(folder / "out/basis.safetensors").items()}
    assert shapes["x.0.0"] == (32, 24) and (len(shapes) == 1) == (kind == "stock")


def test_tensorboard_gets_the_curve(folder: Path) -> None:
    pytest.importorskip("tensorboardX")
    save_model(folder / "dense")
    options = (
        "weights: norms\nheld_out: 4\nbatch: 2\nlogger: tensorboard\ntrain: {data: tokens.npy}\n"
    )
    (folder / "options.yaml").write_text(options)
    status, _, err = invoke("recover", "dense", "--output", "better", "--options", "options.yaml")
    assert status == 0, err
    (events,) = (folder / "better/recover").glob("**/events.out.*")
    assert HELD_OUT.encode() in events.read_bytes()


@pytest.mark.parametrize("profiler", ["simple", "advanced", "pytorch"])
def test_what_a_profiler_finds_lies_beside_the_curves_and_the_bar_can_be_left_out(
    profiler: str, folder: Path
) -> None:
    save_model(folder / "dense")
    sets = [
        "train.data=tokens.npy",
        "held_out=4",
        "batch=10",
        "weights=norms",
        f"trainer.profiler={profiler}",
        "trainer.enable_progress_bar=false",
    ]
    status, _, err = invoke(
        "recover", "dense", "--output", "out", *[a for s in sets for a in ("--set", s)]
    )
    assert status == 0, err
    (found,) = (folder / "out/recover").glob(f"fit-{profiler}-profile*.txt")
    assert "FIT Profiler Report" in found.read_text()


def test_lightnings_own_checks_before_training_leave_the_curve_as_it_is(folder: Path) -> None:
    save_model(folder / "dense")
    options = "weights: norms\nheld_out: 4\nbatch: 2\nchecks: 2\ntrain: {data: tokens.npy}\n"
    (folder / "options.yaml").write_text(options)
    curves = []
    for sanity in (0, 2):
        status, out, err = invoke(
            "recover",
            "dense",
            "--output",
            f"better{sanity}",
            "--options",
            "options.yaml",
            "--json",
            "--set",
            f"trainer.num_sanity_val_steps={sanity}",
        )
        assert status == 0, err
        curves.append(json.loads(out)["recover"]["curve"])
    assert len(curves[0]) == 3 and curves[0] == curves[1]


@pytest.mark.parametrize("kind", STEPS)
def test_a_checkpoint_is_recovered_alone_towards_the_dense_model(kind: str, folder: Path) -> None:
    save_model(folder / "dense")
    text = recipe(*STEPS[kind]()).to_yaml().replace("model: m", f"model: {folder / 'dense'}")
    (folder / "recipe.yaml").write_text(text)
    before = run(folder / "recipe.yaml", folder / "out", [])
    (folder / "options.yaml").write_text(
        "weights: norms\nloss: {hidden: 0.1, kl: 0.1}\nheld_out: 4\nbatch: 2\nepochs: 3\nlocal: {sequences: 2}\n"
    )
    status, out, err = invoke(
        "recover",
        "out/model",
        "--output",
        "better",
        "--options",
        "options.yaml",
        "--teacher",
        "dense",
        "--set",
        "train.data=tokens.npy",
        "--set",
        "learning_rate=1e-2",
        "--json",
    )
    assert status == 0, err
    document = json.loads(out)
    assert document["recover"]["held_out"]["after"] < document["recover"]["held_out"]["before"]
    configs = [
        json.loads((folder / f"{name}/model/config.json").read_text()) for name in ("out", "better")
    ]
    assert configs[0]["model_type"] == configs[1]["model_type"] and (
        configs[0]["model_type"] == "invariance"
    ) == (kind == "ours")
    after = AutoModelForCausalLM.from_pretrained(folder / "better/model").eval()
    assert stored(after) == before["parameters"]["sliced"]["total"]
    held = Tokens(tokens().ids[-4:], tokens().mask[-4:])
    assert math.isclose(
        perplexity(after, held), document["recover"]["held_out"]["after"], rel_tol=1e-3
    )
    card = (folder / "better/model/README.md").read_text()
    assert card.startswith("---\n") and f"{document['recover']['held_out']['after']:,.2f}" in card
    for part in (
        "## What it costs",
        "## Exactness",
        "## Recipe of the slice",
        "steps:",
        "from_pretrained",
    ):
        assert part in card  # of the run beside it
    assert "learning_rate: 0.01" in card and "towards dense" in card  # as asked
    assert document["recover"]["local_tokens"] == 2 * tokens().ids.shape[1]
    assert "after stages one by one" in card
    assert f"{stored(after):,} stored parameters" in card


def test_what_is_recovered_twice_still_tells_how_it_was_sliced_and_how_it_is_loaded(
    folder: Path,
) -> None:
    save_model(folder / "dense")
    text = recipe(*STEPS["ours"]()).to_yaml().replace("model: m", f"model: {folder / 'dense'}")
    (folder / "recipe.yaml").write_text(text)
    report = run(folder / "recipe.yaml", folder / "out", [])
    report["model"] |= {"name": "owner/name", "origin": "owner/name", "licence": "mit"}
    (folder / "out/report.json").write_text(
        json.dumps(report)
    )  # as if it had been sliced from the hub
    options = "weights: norms\nheld_out: 4\nbatch: 2\nchecks: 2\ntrain: {data: tokens.npy}\n"
    (folder / "options.yaml").write_text(options)
    for model, after in (("out/model", "once"), ("once/model", "twice"), ("dense", "plain")):
        status, _, err = invoke("recover", model, "--output", after, "--options", "options.yaml")
        assert status == 0, err
        card = (folder / after / "model/README.md").read_text()
        sections = {line for line in card.splitlines() if line.startswith("## ")}
        assert {"## Load", "## What it is worth", "## Training", "## Licence"} <= sections
        slicing = {"## What it costs", "## Exactness, before it was cut", "## Recipe of the slice"}
        assert sections & slicing == (slicing if after != "plain" else set())
        assert ("import invariance" in card) == (after != "plain")
        assert f"# {model.removesuffix('/model')}, recovered" in card
        whose = {"base_model: owner/name", "license: mit", "owner/name is under the licence `mit`"}
        assert {told for told in whose if told in card} == (whose if after != "plain" else set())


REFUSED = {
    "no text": ([], "train.data"),
    "no teacher": (["train.data=tokens.npy", "loss.kl=1"], "--teacher"),
    "option": (["train.data=tokens.npy", "trainer.precison=64-true"], "did you mean 'precision'?"),
    "owned": (["train.data=tokens.npy", "trainer.max_steps=3"], "recover.epochs"),
    "steps": (["train.data=tokens.npy", "trainer.min_steps=100"], "recover.tokens"),
    "batches": (["train.data=tokens.npy", "trainer.limit_val_batches=0"], "recover.held_out"),
    "rehearsal": (["train.data=tokens.npy", "trainer.fast_dev_run=true"], "recover.tokens"),
    "value": (["train.data=tokens.npy", "trainer.precision=7-bit"], "recover.trainer"),
    "checkpoints": (["train.data=tokens.npy", "trainer.enable_checkpointing=false"], "resume from"),
    "profiler": (["train.data=tokens.npy", "trainer.profiler=xla"], "simple, advanced, pytorch"),
    "logger": (["train.data=tokens.npy", "logger=mlflow"], "pip install mlflow-absent"),
    "held out": (["train.data=tokens.npy", "held_out=24"], "24 windows"),
    "both": (["epochs=1", "tokens=1"], "Keep one"),
    "adapters": (["weights=full", "lora.rank=2"], "adapters"),
    "no loss": (["loss.next_token=0"], "Give"),
    "unknown": (["lossy.kl=1"], "did you mean 'loss'?"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recover_trainer.PACKAGES, "mlflow", ("mlflow-absent",))
    save_model(folder / "dense")
    assignments, said = REFUSED[what]
    status, _, err = invoke(
        "recover", "dense", "--output", "out", *[a for s in assignments for a in ("--set", s)]
    )
    assert status == 2 and said in " ".join(err.split()) and "Traceback" not in err
    assert not (folder / "out").exists()


def test_hidden_states_alone_in_several_processes_are_refused_before_they_wait_for_the_heads_gradient() -> (
    None
):
    def checked(**loss: float) -> None:
        two = {"devices": 2, "strategy": "ddp_fork"}
        asked = Recover.model_validate(
            {"loss": loss, "held_out": 4, "weights": "full", "trainer": two}
        )
        recover_check(asked, tokens(), torch.device("cpu"), "here")

    with pytest.raises(InputError, match="ddp_find_unused_parameters_true"):
        checked(next_token=0.0, hidden=1.0)
    checked(next_token=0.1, hidden=1.0)  # the control


def test_training_that_ends_before_its_first_check_says_so(folder: Path) -> None:
    save_model(folder / "dense")
    sets = ["train.data=tokens.npy", "held_out=4", "batch=2", "trainer.max_time={seconds: 0}"]
    status, _, err = invoke(
        "recover", "dense", "--output", "out", *[a for s in sets for a in ("--set", s)]
    )
    assert status and "before its first check" in " ".join(err.split()) and "Traceback" not in err
    assert not (folder / "out").exists()


def test_a_teacher_that_the_student_was_not_sliced_from_is_refused(folder: Path) -> None:
    save_model(folder / "dense")
    model_of("llama", seed=9).save_pretrained(folder / "other")
    status, _, err = invoke(
        "recover",
        "dense",
        "--output",
        "out",
        "--teacher",
        "other",
        "--set",
        "train.data=tokens.npy",
        "--set",
        "loss.hidden=1",
        "--set",
        "held_out=4",
    )
    assert status == 2 and "embedding" in err
