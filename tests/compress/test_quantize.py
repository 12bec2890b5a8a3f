"""Quantisation: the rounding itself, what it takes to store, that checkpoints hold it, what a rotation does to outliers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import invoke, model_of, save_model, save_tokens
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import fewer, redraw, seeds, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from invariance import compress, load
from invariance.compress.outliers import Outliers, of_stream, of_weights
from invariance.compress.rounding.apply import quantized, rounding_error
from invariance.compress.rounding.scheme import packed_bytes, scheme
from invariance.io.data import Tokens
from invariance.io.models import is_rounded
from invariance.io.rounded import rounded
from invariance.method.rounding import SCALE
from invariance.model.verify import logits, relative_error, tolerance
from invariance.recipe.quantize import Quantize

GROUP = 8
FAMILIES = ["llama", "opt", "phi"]
ROTATED = [{"spaces": "residual", "rotate": "hadamard"}, {"spaces": "vo", "rotate": "hadamard"}]
options = st.builds(
    Quantize,
    bits=st.integers(2, 8),
    group=st.sampled_from([4, 8, 32]),
    tables=st.none() | st.integers(2, 8),
)


def plain(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every weight of a quantised model as the numbers that it stands for, by name."""
    names = {module: path for path, module in model.named_modules()}
    return {f"{names[m]}.{n}": p.dequantize().detach() for m, n, p in rounded(model)}  # type: ignore[operator]


def steps_and_errors(model: PreTrainedModel, asked: Quantize) -> list[tuple[Tensor, Tensor]]:
    """Of every weight, by groups: the group's scale, and by how much the weights have moved."""
    twin, found = quantized(model, asked), []
    for path in scheme(model, asked):
        W, Q = model.get_submodule(path).weight.detach(), twin.get_submodule(path).weight
        moved = (Q.dequantize() - W).abs().unflatten(1, (-1, asked.group))
        found.append((Q.scale.float()[..., None], moved))
    return found


@fewer
@given(family=st.sampled_from(FAMILIES), asked=options, seed=seeds)
def test_no_weight_moves_by_more_than_half_a_step(family: str, asked: Quantize, seed: int) -> None:
    found = steps_and_errors(redraw(model_of(family), seed), asked)
    # W·(1/s) and W - q·s err by 3u|W| together, |W| ≤ 2⁷ s: by less than 2⁹ eps of half a step.
    slack = 1 + 2**9 * torch.finfo(torch.float32).eps
    assert found and all((moved <= step / 2 * slack).all() for step, moved in found)
    if asked.bits < 8:  # the control: half of that is too little, so the bound says something
        assert any((moved > step / 4).any() for step, moved in found)


def test_the_scale_is_the_least_that_reaches_all_weights_of_its_group() -> None:
    asked = Quantize(bits=4, group=GROUP)
    model = model_of("llama")
    twin = quantized(model, asked)
    W = model.model.layers[0].mlp.up_proj.weight.detach().unflatten(1, (-1, GROUP))
    least = torch.maximum(W.amax(-1) / 7, W.amin(-1) / -8)
    assert torch.equal(twin.model.layers[0].mlp.up_proj.weight.scale, least.to(SCALE))


@fewer
@given(asked=options, seed=seeds)
def test_weights_that_are_representable_stay_and_others_move(asked: Quantize, seed: int) -> None:
    model = redraw(model_of("llama"), seed)
    once = quantized(model, asked)
    assert rounding_error(model, once, asked) > 0
    numbers = plain(once)
    with torch.no_grad():
        for name, value in numbers.items():
            model.get_parameter(name).copy_(value)
    again = quantized(model, asked)
    assert all(torch.equal(value, numbers[name]) for name, value in plain(again).items())
    assert rounding_error(model, again, asked) == 0


def test_more_bits_and_smaller_groups_move_weights_less() -> None:
    model = model_of("llama")
    asked = [Quantize(bits=b, group=g) for b, g in ((2, 8), (3, 8), (4, 32), (4, 8), (8, 8))]
    errors = [rounding_error(model, quantized(model, q), q) for q in asked]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == len(errors)


def pack(q: Tensor, bits: int) -> int:
    """How many bytes integers take, packed tightly; that they fit is checked by unpacking them."""
    raised = (q.reshape(-1).long() + 2 ** (bits - 1)).tolist()
    assert min(raised) >= 0 and max(raised) < 2**bits
    whole = sum(v << bits * n for n, v in enumerate(raised))
    held = whole.to_bytes(-(-len(raised) * bits // 8), "little")
    read = int.from_bytes(held, "little")
    assert [read >> bits * n & (2**bits - 1) for n in range(len(raised))] == raised
    return len(held)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "asked", [Quantize(group=8), Quantize(bits=3, tables=5, group=32), Quantize(tables=None)]
)
def test_the_bytes_are_those_of_the_stored_integers_and_scales_packed(
    family: str, asked: Quantize, tmp_path: Path
) -> None:
    model = model_of(family)
    quantized(model, asked).save_pretrained(tmp_path)
    bits = scheme(model, asked)
    total = 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor, (path, _, leaf) = file.get_tensor(name), name.rpartition(".")
            if leaf == "_weight_zero_point":
                assert not tensor.any()  # nothing to store
            elif leaf == "_weight_qdata":
                total += pack(tensor, bits[path])
            else:
                total += tensor.nbytes
    assert total == packed_bytes(model, asked, torch.float32)
    assert (
        total
        < packed_bytes(model, None, torch.float32)
        == sum(p.nbytes for p in model.parameters())
    )


def test_norms_biases_and_positions_are_not_rounded() -> None:
    model = model_of("opt")
    twin = quantized(model, Quantize(group=GROUP))
    kept = {
        n
        for n, p in model.named_parameters()
        if torch.equal(p, plain(twin).get(n, twin.get_parameter(n)))
    }
    assert {n for n in kept if "norm" in n or n.endswith("bias") or "positions" in n} == kept
    assert any("positions" in n for n in kept) and any(n.endswith("bias") for n in kept)


FRESH = """
import sys
sys.modules["invariance"] = None  # any import of it raises ImportError
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.save({"logits": model(ids).logits}, folder + "/fresh.pt")
    model.generate(ids, max_new_tokens=3, do_sample=False)
"""


def small(family: str, steps: Any, tie: str = "untie", **quantize: Any) -> PreTrainedModel:
    return compress(
        model_of(family), {"model": "tiny", "tie": tie, "steps": steps, "quantize": quantize}
    )


UNCHANGED = [{"spaces": "mlp", "rotate": "identity"}]
SLICED = [{"spaces": "mlp", "rotate": "identity", "select": {"uniform": {"width": 32}}}]
RAGGED = [SLICED[0] | {"spaces": "mlp.0"}]


def test_stock_checkpoints_load_in_plain_transformers_with_the_same_logits(tmp_path: Path) -> None:
    made = {
        "tied": small("llama", UNCHANGED),
        "tables whole": small("llama", UNCHANGED, tables=None),
        "sliced": small("phi", SLICED, bits=3, group=8),
        "untied": small("llama", ROTATED, bits=8),
    }
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in made]
    done = subprocess.run([sys.executable, "-c", FRESH, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, model in made.items():
        fresh = torch.load(tmp_path / name / "fresh.pt", weights_only=True)["logits"]
        assert torch.equal(fresh, logits(model, torch.arange(1, 9)[None])), name


@pytest.mark.parametrize(
    ("family", "steps", "tie"),
    [
        ("llama", UNCHANGED, "untie"),
        ("llama", ROTATED, "keep"),
        ("opt", RAGGED, "untie"),
        ("phi", SLICED, "untie"),
    ],
)
def test_a_quantised_checkpoint_is_read_as_the_numbers_that_its_weights_stand_for(
    family: str, steps: Any, tie: str, tmp_path: Path
) -> None:
    model, ids = small(family, steps, tie), torch.arange(1, 9)[None]
    model.save_pretrained(tmp_path / "first")
    packed, read = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "first"),
        load(str(tmp_path / "first")),
    )
    assert list(rounded(packed)) and not list(rounded(read)) and "hf_quantizer" not in vars(read)
    assert torch.equal(logits(packed, ids), logits(model, ids))
    assert torch.equal(logits(read, ids), logits(model, ids))
    read.save_pretrained(tmp_path / "again")  # floating point now, and nothing says otherwise
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert torch.equal(logits(load(str(tmp_path / "again")), ids), logits(model, ids))
    assert [is_rounded(str(tmp_path / name)) for name in ("first", "again")] == [True, False]


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    model = small("llama", UNCHANGED)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [n for n in file.keys() if n.startswith("lm_head")]  # noqa: SIM118
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.lm_head.weight is read.model.embed_tokens.weight


def spiky(seed: int = 0) -> PreTrainedModel:
    """A model of which one channel of the stream is large: in tokens, in what writes the stream and in what reads it."""
    model = redraw(model_of("llama", tie_word_embeddings=False), seed)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 40
        for module in model.modules():
            if (
                isinstance(module, nn.Linear)
                and module.in_features == 32
                and module is not model.lm_head
            ):
                module.weight[:, 5] *= 10
    return model


def test_a_hadamard_basis_leaves_logits_alone_and_lowers_planted_outliers_of_stream_and_weights() -> (
    None
):
    dense = spiky()
    turned = compress(dense, {"model": "tiny", "steps": ROTATED})
    ids = torch.arange(1, 31)[None]
    assert relative_error(logits(dense, ids), logits(turned, ids)) <= tolerance(torch.float32, 4)
    asked, text = Quantize(group=32), Tokens(tokens(batch=4), torch.ones(4, 7, dtype=torch.bool))
    before, after = (of_stream(m, text) for m in (dense, turned))
    assert (
        after.peak < before.peak
        and after.largest_peak < before.largest_peak
        and after.kurtosis < before.kurtosis
    )
    assert of_weights(turned, asked).peak < of_weights(dense, asked).peak
    same = compress(
        dense, {"model": "tiny", "steps": [{"spaces": "mlp", "rotate": "identity"}]}
    )  # the control
    assert of_stream(same, text) == before and of_weights(same, asked) == of_weights(dense, asked)


def test_rounding_behind_a_hadamard_basis_moves_logits_less_where_outliers_were_planted() -> None:
    dense, ids, errors = spiky(), torch.arange(1, 31)[None], {}
    for name, steps in (("turned", ROTATED), ("as it is", UNCHANGED)):
        model = compress(dense, {"model": "tiny", "steps": steps, "quantize": {"group": 32}})
        errors[name] = relative_error(logits(dense, ids), logits(model, ids))
    assert errors["turned"] < errors["as it is"]


@given(scale=st.floats(1e-3, 1e3), n=st.sampled_from([2, 16, 64]), seed=seeds)
def test_outlier_statistics_ignore_scale_and_have_known_ends(
    scale: float, n: int, seed: int
) -> None:
    flat, spike = torch.ones(3, n), torch.eye(n)[:3]
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(seed))
    near = {"rel": 1e-6}  # float32 numbers, scaled
    assert Outliers.of([flat * scale]).to_dict() == pytest.approx(
        {"peak": 1, "largest_peak": 1, "kurtosis": 1}, **near
    )
    ends = {"peak": n**0.5, "largest_peak": n**0.5, "kurtosis": n}
    assert Outliers.of([spike * scale]).to_dict() == pytest.approx(ends, **near)
    mixed = Outliers.of([x, x * scale, torch.zeros(2, n)]).to_dict()
    assert mixed == pytest.approx(Outliers.of([x]).to_dict(), **near)


RECIPE = """model: ROOT/tiny
calibrate: {data: ROOT/tokens.npy, dtype: float32}
steps:
  - {spaces: mlp, rotate: permute, select: {uniform: {width: 32}}}
quantize: {bits: 4, group: 8}
evaluate: [{perplexity: {data: ROOT/tokens.npy, name: text}}]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("quantize")
    save_model(folder / "tiny")
    save_tokens(folder / "tokens.npy")
    (folder / "recipe.yaml").write_text(RECIPE.replace("ROOT", str(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(folder / "cache"))
        yield folder


def test_a_run_reports_bytes_perplexities_errors_and_outliers_of_plain_and_rounded_models(
    root: Path,
) -> None:
    status, out, err = invoke("run", root / "recipe.yaml", "--output", root / "out")
    assert status == 0, err
    report = json.loads((root / "out" / "report.json").read_text())
    found, measured = report["quantize"], report["perplexity"]["text"]
    sides = {"dense", "sliced", "dense_quantized", "quantized"}
    assert set(found["bytes"]) == sides <= set(measured)
    b = found["bytes"]
    assert b["quantized"] < b["dense_quantized"] < b["sliced"] < b["dense"]
    assert b["dense"] == 4 * report["parameters"]["dense"]["total"]
    assert b["sliced"] == 4 * report["parameters"]["sliced"]["total"]
    assert len({measured[side] for side in sides}) == 4
    files = (root / "out" / "model").glob("*.safetensors")
    assert found["file_bytes"] == sum(f.stat().st_size for f in files)
    assert set(found["rounding_error"]) == {"dense_quantized", "quantized"}
    assert (
        set(found["outliers"]["stream"]) == set(found["outliers"]["weights"]) == {"dense", "sliced"}
    )
    assert report["versions"]["torchao"]
    page, card = (root / "out" / name for name in ("report.html", "model/README.md"))
    for text in (out, page.read_text().lower(), card.read_text()):
        assert "at 4 bits, groups of 8" in text
    assert "max/RMS" in out and "max/RMS" in page.read_text() and "torchao" in card.read_text()
    again = json.loads(
        invoke("evaluate", root / "out" / "model", "--data", root / "tokens.npy", "--json")[1]
    )
    (value,) = again["perplexity"].values()
    assert value["model"] == pytest.approx(measured["quantized"], rel=1e-6)  # float32, another walk


def test_a_run_without_quantisation_says_nothing_of_it(root: Path) -> None:
    status, out, err = invoke(
        "run", root / "recipe.yaml", "--output", root / "without", "--set", "quantize=null"
    )
    assert status == 0, err
    report = json.loads((root / "without" / "report.json").read_text())
    assert report["quantize"] is None and "quantized" not in report["perplexity"]["text"]
    assert "bits" not in out and "max/RMS" not in out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("quantize.bits=9", "less than or equal to 8"),
        ("quantize.bits=1", "greater than or equal to 2"),
        ("quantize.group=1", "greater than or equal to 2"),
        ("quantize.tables=16", "less than or equal to 8"),
        ("nested=[0.5]", "cannot be cut to the narrower models that `nested` asks for"),
        ("quantize.groups=8", "did you mean 'group'"),
        (
            "quantize.group=12",
            "have 32 weights, which groups of 12 do not divide. Take a group that divides 32",
        ),
        (
            "steps.0.select.uniform.width=30",
            "down.weight have 30 weights.*give the steps `widths: {multiple_of: 8}`",
        ),
        ("steps.0.select=global_energy", "which groups of 8 do not divide"),
    ],
)
def test_what_cannot_be_quantised_is_refused_before_anything_is_written(
    root: Path, change: str, says: str
) -> None:
    more = ["--set", "budget.parameters=0.93"] if "global" in change else []
    status, _, err = invoke(
        "run", root / "recipe.yaml", "--output", root / "refused", "--set", change, *more
    )
    assert status == 2 and re.search(says, " ".join(err.split())) and "Traceback" not in err
    assert not (root / "refused").exists()


def test_without_torchao_one_message_says_what_to_install(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    status, _, err = invoke("run", root / "recipe.yaml", "--output", root / "refused")
    assert status == 2 and "pip install 'invariance[quant]'" in " ".join(err.split())
    assert not (root / "refused").exists()
