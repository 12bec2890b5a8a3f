"""Save, load, same logits: stock checkpoints where they can be, our own elsewhere, and the reason why."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import VOCABULARY, model_of, save_tokens, stored_numbers
from tiny import tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from invariance.compress.planner import plan
from invariance.io.checkpoint import InvarianceForCausalLM
from invariance.model.verify import logits, relative_error, tolerance
from invariance.recipe.recipe import Recipe
from invariance.run.outcome import Outcome, outcome

IDS = torch.arange(1, 25)[None] % VOCABULARY
GLOBAL = {"spaces": "residual", "rotate": "pca", "select": {"uniform": {"width": 24}}}
STAGES = GLOBAL | {"segments": "stage"}
MLP = {
    "spaces": "mlp",
    "rotate": "permute",
    "select": {"uniform": {"width": 40}},
    "slice": "least_squares",
}
HEADS = {"spaces": "vo", "rotate": "head_svd", "select": {"uniform": {"width": 6}}}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "global": [GLOBAL],
    "stages": [STAGES],
    "mlp": [MLP],
    "heads": [HEADS],
    "all": [STAGES, MLP, HEADS],
}
STOCK = {
    ("llama", "global"),
    ("llama", "mlp"),
    ("qwen3", "global"),
    ("qwen3", "mlp"),
    ("opt", "mlp"),
    ("phi", "mlp"),
}


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.chdir(root)
        save_tokens(root / "tokens.npy")
        yield


def dense(family: str, tied: bool = False, **options: Any) -> PreTrainedModel:
    return model_of(family, tie_word_embeddings=tied, **options)


def compressed(model: PreTrainedModel, steps: list[dict[str, Any]], **keys: Any) -> Outcome:
    calibrate = {"data": "tokens.npy", "dtype": "float32"}
    recipe = Recipe.from_dict({"model": "m", "calibrate": calibrate, "steps": steps} | keys)
    return outcome(model, recipe, evaluate=False)


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def generated(model: PreTrainedModel, cache: bool) -> list[int]:
    return model.generate(IDS[:, :5], max_new_tokens=6, do_sample=False, use_cache=cache)[
        0
    ].tolist()  # type: ignore


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "phi"])
def test_what_is_saved_loads_with_the_same_logits(
    family: str, name: str, tied: bool, tmp_path: Path
) -> None:
    made = compressed(dense(family, tied), RECIPES[name])
    loaded = reloaded(made.model, tmp_path)
    assert made.report["model"]["stock"] == ((family, name) in STOCK), made.report["model"][
        "why_not_stock"
    ]
    assert isinstance(loaded, InvarianceForCausalLM) != made.report["model"]["stock"]
    assert relative_error(logits(made.model, IDS), logits(loaded, IDS)) <= tolerance(
        torch.float32, 4
    )
    assert stored_numbers(tmp_path) == made.report["parameters"]["sliced"]["total"]
    assert generated(loaded, True) == generated(loaded, False) == generated(made.model, True)
    assert (
        relative_error(logits(dense(family, tied), IDS), logits(loaded, IDS)) > 1e-4
    )  # it was cut


@pytest.mark.parametrize("name", ["global", "stages", "all"])
def test_a_tie_that_is_kept_is_stored_once_with_a_matrix_before_the_head(
    name: str, tmp_path: Path
) -> None:
    kept = compressed(dense("llama", True), RECIPES[name], tie="keep")
    loaded = reloaded(kept.model, tmp_path)
    assert relative_error(logits(kept.model, IDS), logits(loaded, IDS)) <= tolerance(
        torch.float32, 4
    )
    parts = kept.report["parameters"]["sliced"]
    assert stored_numbers(tmp_path) == parts["total"]
    assert (parts["embedding"], parts["head"]) == (VOCABULARY * 24, 24 * 24)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    apart = compressed(dense("llama", True), RECIPES[name])
    assert apart.report["parameters"]["sliced"]["head"] >= VOCABULARY * 24


def test_a_kept_tie_leaves_the_logits_while_nothing_is_cut(tmp_path: Path) -> None:
    turned = [{"spaces": "residual", "rotate": "random_orthogonal", "segments": "stage"}]
    made = compressed(dense("llama", True), turned, tie="keep")
    for model in (made.model, reloaded(made.model, tmp_path)):
        error = relative_error(logits(dense("llama", True), IDS), logits(model, IDS))
        assert 0 < error <= tolerance(torch.float32, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["global", "all"])
def test_the_dtype_of_the_model_is_that_of_the_checkpoint(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    dense("llama").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype).eval()
    made = compressed(model, RECIPES[name])
    loaded = reloaded(made.model, tmp_path / "made")
    assert (
        {p.dtype for p in loaded.parameters()}
        == {p.dtype for p in made.model.parameters()}
        == {dtype}
    )
    assert torch.equal(logits(made.model, IDS), logits(loaded, IDS))
    for model in (made.model, loaded):  # rotary frequencies are not rounded with the weights
        assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    ("family", "tied", "steps", "keys", "why"),
    [
        ("llama", False, [STAGES], {}, "at 4 of its edges, in a shortcut"),
        ("llama", False, [HEADS], {}, "value heads have 6 dims and query/key heads 8"),
        (
            "llama",
            True,
            [GLOBAL],
            {"tie": "keep"},
            "the tied head reads the table through a k×k matrix",
        ),
        (
            "llama",
            False,
            [MLP | {"spaces": "mlp.1"}],
            {},
            r"mlp widths differ from layer to layer \(40 to 64\)",
        ),
        ("llama", False, [GLOBAL | {"slice_head": False}], {}, "residual widths differ"),
        ("opt", False, [GLOBAL], {}, "LayerNorm needs norms that subtract no mean"),
        ("phi", False, [GLOBAL], {}, "LayerNorm needs norms that subtract no mean"),
    ],
)
def test_what_no_stock_config_holds_says_why(
    family: str, tied: bool, steps: list[dict[str, Any]], keys: dict[str, Any], why: str
) -> None:
    report = compressed(dense(family, tied), steps, **keys).report["model"]
    assert not report["stock"] and report["exported_as"] == "invariance"
    assert re.search(why, report["why_not_stock"])


def test_gains_and_eps_carry_the_mean_square_over_the_original_width() -> None:
    made = compressed(dense("llama"), [GLOBAL]).model
    assert made.config.model_type == "mistral"  # whose heads are known not to fill the stream
    assert made.config.hidden_size == 24
    assert made.config.rms_norm_eps == pytest.approx(
        dense("llama").config.rms_norm_eps * 32 / 24, rel=1e-12
    )
    gains = {n: p for n, p in made.named_parameters() if "norm" in n}
    assert len(gains) == 5
    for gain in gains.values():
        assert torch.equal(gain, torch.full((24,), (32 / 24) ** 0.5))
    assert made.config.head_dim == 8 and made.config.num_attention_heads == 4


@pytest.mark.parametrize("width", [24, 27])
def test_a_model_with_biases_keeps_its_type_where_its_heads_do_not_fill_the_stream(
    width: int, tmp_path: Path
) -> None:
    """A mistral has no place for a bias, so the type that others read more surely is none for this model."""
    model = tiny("qwen2", hidden_size=32, head_dim=8, vocab_size=VOCABULARY)
    made = compressed(model, [GLOBAL | {"select": {"uniform": {"width": width}}}])
    assert made.report["model"]["stock"], made.report["model"]["why_not_stock"]
    assert made.model.config.model_type == "qwen2" and made.model.config.hidden_size == width
    loaded = reloaded(made.model, tmp_path)
    assert any(n.endswith("q_proj.bias") for n, _ in loaded.named_parameters())
    assert relative_error(logits(made.model, IDS), logits(loaded, IDS)) <= tolerance(
        torch.float32, 4
    )


def test_a_stream_that_heads_fill_keeps_its_type() -> None:
    step = {"spaces": "mlp", "rotate": "permute", "select": {"uniform": {"keep": 0.5}}}
    assert compressed(dense("llama"), [step]).model.config.model_type == "llama"


def test_a_width_that_heads_do_not_divide_is_exported_as_mistral(tmp_path: Path) -> None:
    made = compressed(dense("llama"), [GLOBAL | {"select": {"uniform": {"width": 27}}}])
    assert (
        made.model.config.model_type == "mistral"
        and made.report["model"]["exported_as"] == "mistral"
    )
    assert made.model.config.hidden_size == 27 and made.model.config.sliding_window is None
    loaded = reloaded(made.model, tmp_path)
    assert relative_error(logits(made.model, IDS), logits(loaded, IDS)) <= tolerance(
        torch.float32, 4
    )
    long = torch.randint(1, VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(0))
    assert relative_error(logits(made.model, long), logits(loaded, long)) <= tolerance(
        torch.float32, 4
    )


def test_a_mistral_model_keeps_its_window() -> None:
    model = tiny(
        "mistral",
        hidden_size=32,
        head_dim=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=320,
        sliding_window=40,
    )
    made = compressed(model, [MLP | {"select": {"uniform": {"width": 24}}}])
    assert made.report["model"]["stock"] and made.model.config.sliding_window == 40
    ids = torch.randint(1, VOCABULARY, (1, 100), generator=torch.Generator().manual_seed(0))
    found = logits(made.model, ids)
    assert relative_error(logits(model, ids), found) <= tolerance(
        torch.float32, 4
    )  # 24 of 24 channels
    made.model.config.sliding_window = None
    for layer in made.model.model.layers:
        layer.self_attn.sliding_window = None
    assert (
        relative_error(found, logits(made.model, ids)) > 1e-3
    )  # the control: tokens are that far apart


def test_a_rotated_model_that_keeps_its_widths_is_stock_and_untied(tmp_path: Path) -> None:
    made = compressed(dense("llama", True), [{"spaces": "residual", "rotate": "hadamard"}])
    loaded = reloaded(made.model, tmp_path)
    assert not isinstance(loaded, InvarianceForCausalLM) and not loaded.config.tie_word_embeddings
    error = relative_error(logits(dense("llama", True), IDS), logits(loaded, IDS))
    assert error <= tolerance(torch.float32, 4)


def test_biases_of_attention_and_mlp_survive_the_stock_form(tmp_path: Path) -> None:
    model = dense("llama", attention_bias=True, mlp_bias=True)
    made = compressed(model, [GLOBAL, MLP])
    assert made.report["model"]["stock"]
    loaded = reloaded(made.model, tmp_path)
    assert any(n.endswith("down_proj.bias") for n, _ in loaded.named_parameters())
    assert relative_error(logits(made.model, IDS), logits(loaded, IDS)) <= tolerance(
        torch.float32, 4
    )


def test_a_saved_checkpoint_of_our_own_holds_no_code_and_no_pickle(tmp_path: Path) -> None:
    compressed(dense("opt"), [STAGES]).model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert "auto_map" not in (tmp_path / "config.json").read_text()


def test_hidden_states_are_those_before_every_block_and_behind_the_final_norm() -> None:
    cut = MLP | {
        "spaces": "mlp.1"
    }  # widths differ, so the form is our own; the stream keeps its basis
    model, small = dense("llama"), compressed(dense("llama"), [cut]).model
    assert isinstance(small, InvarianceForCausalLM)
    ours, theirs = (m(input_ids=IDS, output_hidden_states=True) for m in (small, model))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    bound = tolerance(torch.float32, 4)
    for mine, other in zip(ours.hidden_states[:2], theirs.hidden_states[:2], strict=True):
        assert relative_error(other, mine) <= bound
    assert (
        relative_error(theirs.hidden_states[2], ours.hidden_states[2]) > 100 * bound
    )  # behind the cut
    assert torch.equal(small.get_output_embeddings()(ours.hidden_states[-1]), ours.logits)
    assert small(input_ids=IDS).hidden_states is None
    parts = small(input_ids=IDS, output_hidden_states=True, return_dict=False)
    assert torch.equal(parts[0], ours.logits) and torch.equal(parts[-1][1], ours.hidden_states[1])


PAIRS = {
    "spaces": "qk",
    "rotate": {"rope_pairs": {"per": "model"}},
    "select": {"uniform": {"width": 4}},
}
HALF = {"spaces": "vo", "rotate": "head_svd", "select": {"uniform": {"width": 4}}}


@pytest.mark.parametrize(
    ("family", "steps", "options"),
    [
        ("llama", [GLOBAL], {}),
        ("llama", [GLOBAL | {"select": {"uniform": {"width": 27}}}], {}),  # as mistral
        ("opt", [GLOBAL], {}),
        ("phi", [MLP], {}),
        ("llama", [PAIRS, HALF], {}),
        (
            "llama",
            [PAIRS, HALF],
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        ),
        ("phi", [PAIRS | {"select": {"uniform": {"width": 6}}}, HEADS], {}),
        (
            "phi",
            [{"spaces": ["heads"], "rotate": "permute", "select": {"uniform": {"width": 1}}}],
            {},
        ),
    ],
)
def test_a_plan_knows_what_the_export_will_say(
    family: str, steps: list[Any], options: dict[str, Any]
) -> None:
    model = dense(family, False, **options)
    recipe = Recipe.from_dict({"model": "m", "calibrate": {"data": "tokens.npy"}, "steps": steps})
    chart = plan(recipe, model.config)
    widths = chart.allocate(None)
    assert widths is not None
    report = compressed(model, steps).report["model"]
    assert chart.why_not_stock(widths) == report["why_not_stock"]
    assert report["stock"] == (report["why_not_stock"] is None)


# Norms on heads and behind branches: what stays of layers of two types

STREAM = {
    "spaces": "residual",
    "rotate": "identity",
    "select": {"uniform": {"width": 24}},
    "slice": "truncate",
}
FIRST = {"spaces": ["heads.0", "mlp.0"], "rotate": "identity", "select": {"uniform": {"width": 0}}}
GONE = FIRST | {"slice": "truncate", "widths": {"min": 0}}
GEMMA: dict[str, tuple[list[dict[str, Any]], str | None]] = {
    "mlp": ([MLP], None),
    "stream": ([STREAM, MLP], None),
    "groups": (
        [{"spaces": "heads", "rotate": "permute", "select": {"uniform": {"width": 1}}}],
        None,
    ),
    "depth": ([GONE], None),
    "values": ([MLP, HEADS], "value heads have 6 dims"),
    "some": ([MLP | {"spaces": "mlp.1"}], "mlp widths differ"),
}
FRESH = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
assert "invariance" not in sys.modules
logits = model(torch.tensor([[int(n) for n in sys.argv[2].split()]])).logits
print(type(model).__name__, repr(logits.detach().double().norm().item()))
"""


@pytest.mark.parametrize("name", GEMMA)
def test_layers_of_two_types_survive_the_export(name: str, tmp_path: Path) -> None:
    steps, why = GEMMA[name]
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    angles = {
        t: {"rope_type": "default", "rope_theta": b}
        for t, b in zip(layers, (1e2, 1e4), strict=False)
    }
    model = dense(
        "gemma3_text", True, num_hidden_layers=3, layer_types=layers, rope_parameters=angles
    )
    made = compressed(model, steps)
    report = made.report["model"]
    assert report["stock"] == (why is None) and (why or "") in (report["why_not_stock"] or "")
    loaded = reloaded(made.model, tmp_path)
    assert relative_error(logits(made.model, IDS), logits(loaded, IDS)) <= tolerance(
        torch.float32, 6
    )
    assert generated(loaded, True) == generated(loaded, False) == generated(made.model, True)
    assert stored_numbers(tmp_path) == made.report["parameters"]["sliced"]["total"]
    assert relative_error(logits(model, IDS), logits(loaded, IDS)) > 1e-4  # it was cut
    config = loaded.config
    assert config.layer_types == (layers[1:] if name == "depth" else layers)
    assert (config.head_dim, config.sliding_window, config.query_pre_attn_scalar) == (8, 3, 6)
    assert {t: config.rope_parameters[t]["rope_theta"] for t in angles} == dict(
        zip(angles, (1e2, 1e4), strict=True)
    )
    if name != "stream":
        return
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path), " ".join(map(str, IDS[0].tolist()))],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    kind, norm = done.stdout.split()
    assert kind == "Gemma3ForCausalLM"
    assert float(norm) == pytest.approx(logits(made.model, IDS).double().norm().item(), rel=1e-4)


def test_a_gain_of_one_plus_w_is_written_back_as_w() -> None:
    model = dense("gemma3_text", True)
    made = compressed(model, [MLP]).model
    norms = {n: p for n, p in model.named_parameters() if n.endswith("norm.weight")}
    assert len(norms) == 2 * 6 + 1
    assert all(torch.equal(p, made.get_parameter(n)) for n, p in norms.items())
