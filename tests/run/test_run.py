"""What a run promises: the given model left as it is, exact rotations or none, widths, shortcuts and budgets as asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import model_of, save_model, stored_numbers
from safetensors.torch import load_file
from sliced import HEADS, MLP, RESIDUAL, dense, recipe, sliced, tokens
from sliced import data as data
from transformers import PreTrainedModel

from invariance.calibrate import walk
from invariance.calibrate.certificate import certify_random
from invariance.compress import calibration
from invariance.compress.planner import plan
from invariance.core.errors import CertificateError
from invariance.io.models import weights_digest
from invariance.io.source import open_source
from invariance.model import verify, working
from invariance.model.labels import label
from invariance.model.layout import Layout
from invariance.model.verify import logits, relative_error, tolerance
from invariance.recipe.recipe import Recipe
from invariance.run.compress import compress
from invariance.run.outcome import outcome
from invariance.run.run import run


@pytest.mark.parametrize("rotator", ["random_orthogonal", "hadamard", "identity"])
@pytest.mark.parametrize("order", ["oneshot", "sequential"])
def test_bases_that_need_no_moments_need_no_tokens_and_no_walk(
    rotator: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_a: Any, **_k: Any) -> None:
        raise AssertionError("a walk over tokens")

    monkeypatch.setattr(walk, "oneshot", never)
    monkeypatch.setattr(calibration, "enter", never)
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
    assert (
        model.config._attn_implementation == attention
        and [type(m) for m in model.modules()] == modules
    )
    assert not {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in small.parameters()
    }


@pytest.mark.parametrize("order", ["oneshot", "sequential"])
def test_a_rotation_that_is_not_exact_stops_the_run(
    order: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real_one = working.reparametrize

    def faulty(model: PreTrainedModel, layout: Layout, changes: Any, within: Any) -> None:
        real_one(model, layout, changes, within)
        if layout.edges[0].stage + "." in within:
            with torch.no_grad():
                next(iter(model.get_submodule(layout.edges[0].stage).parameters())).mul_(1 + 1e-8)

    monkeypatch.setattr(working, "reparametrize", faulty)
    ended: list[Any] = []
    monkeypatch.setattr(working.Working, "settle", lambda self: ended.append(self))
    with pytest.raises(CertificateError, match="Nothing is written"):
        sliced(recipe(RESIDUAL, order=order))
    assert not ended


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
def test_shortcuts_lie_where_two_bases_meet_and_nowhere_else(
    segments: Any, count: int, order: str
) -> None:
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
        steps.append(
            base | segments | {"spaces": name, "select": {"uniform": {"width": widths[name]}}}
        )
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
    made = sliced(
        recipe(
            {"spaces": "residual", "segments": "stage", "rotate": "pca"},
            {"spaces": "mlp", "rotate": "permute"},
            order="sequential",
        )
    )
    twin = verify.exact_copy(dense())
    ids = tokens().ids[:2]
    assert relative_error(logits(twin, ids), logits(made.model, ids)) <= tolerance(
        torch.float64, made.layout.depth
    )


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


def test_a_checkpoint_keeps_its_dtype(tmp_path: Path) -> None:
    model = model_of("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    text = recipe(MLP).to_yaml().replace("model: m", f"model: {tmp_path / 'model'}")
    (tmp_path / "recipe.yaml").write_text(text)
    report = run(tmp_path / "recipe.yaml", tmp_path / "out", [])
    assert report["model"]["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out/model/model.safetensors").values()} == {
        torch.bfloat16
    }


DROPS = {
    "llama": ("attention_dropout",),
    "qwen3": ("attention_dropout",),
    "gemma3_text": ("attention_dropout",),
    "opt": ("attention_dropout", "dropout", "activation_dropout", "layerdrop"),
    "phi": ("attention_dropout", "resid_pdrop", "embd_pdrop"),
}


@pytest.mark.parametrize("family", DROPS)
def test_what_a_config_drops_in_training_is_not_dropped_here(family: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", family, **dict.fromkeys(DROPS[family], 0.3))
    ids = torch.arange(1, 25)[None]
    assert certify_random(open_source(str(tmp_path / "model")), ids, seed=0).failure is None


@pytest.mark.parametrize("name", ["out", "x" * 254])
def test_a_run_leaves_alone_what_lies_beside_its_output(name: str, tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path / "model")
    text = recipe(MLP).to_yaml().replace("model: m", f"model: {tmp_path / 'model'}")
    (tmp_path / "recipe.yaml").write_text(text)
    mine = tmp_path / ".out.model"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    run(tmp_path / "recipe.yaml", tmp_path / name, [])
    assert (mine / "notes.txt").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"model", "recipe.yaml", ".out.model", name}
