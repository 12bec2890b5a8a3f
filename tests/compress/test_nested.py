"""Nested members: each is what slicing to its widths gives, whatever the space, and a checkpoint like any other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import VOCABULARY, invoke, model_of, save_model, stored_numbers, workplace
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import (
    canonical_copy,
    elements,
    fewer,
    segments,
    share,
    stored,
    subset,
    tiny_models,
    tokens,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from invariance.calibrate.moments import Moment, Moments
from invariance.calibrate.statistic import Statistic
from invariance.compress.nested import extract, first
from invariance.compress.planner import plan
from invariance.core.change import Basis, Change
from invariance.core.errors import InputError
from invariance.core.space import Space
from invariance.io.checkpoint import InvarianceForCausalLM
from invariance.io.export import cast
from invariance.method.budget import Bill
from invariance.method.interfaces import Selector, find, registry
from invariance.model.labels import label
from invariance.model.layout import Layout
from invariance.model.reparametrize import reparametrize
from invariance.model.verify import logits, relative_error, tolerance
from invariance.recipe.recipe import Recipe, parse_recipe
from invariance.run.outcome import Outcome, outcome

F32, F64 = torch.float32, torch.float64
FAMILIES = ("llama", "opt", "phi")
TRUNCATE = find("slice", "truncate")()
IDS = torch.arange(1, 25)[None] % VOCABULARY
MLP = {"spaces": "mlp", "rotate": "permute", "select": "uniform"}
STREAM = {"spaces": "residual", "rotate": "pca", "select": "uniform", "widths": {"multiple_of": 4}}


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with workplace(tmp_path_factory.mktemp("nested"), sequences=32):
        yield


# --- The algebra.


def cut(
    layout: Layout, bases: Mapping[str, Tensor], widths: Mapping[str, int]
) -> dict[str, Change]:
    """What `truncate` makes of bases; points of the stream that share one share its change."""
    made: dict[int, Change] = {}
    for name, A in bases.items():
        energy = torch.ones(A.shape[:-1], dtype=F64)
        k = widths[name]
        made.setdefault(id(A), TRUNCATE.cut(layout.spaces[name], Basis(A, energy), k, Moments()))
    return {name: made[id(A)] for name, A in bases.items()}


def last(layout: Layout, widths: Mapping[str, int]) -> dict[str, Change]:
    """The changes that keep the last directions; of rotary spaces, the last pairs."""
    return {
        n: Change(c.encode.matrix().flip(-2).flip(-1), c.encode.matrix().flip(-2).flip(-1))
        for n, c in first(layout, widths).items()
    }


@given(
    model=tiny_models(),
    data=st.data(),
    fold=st.booleans(),
    by=st.sampled_from(["all", "block", "stage"]),
)
@fewer
def test_the_first_directions_of_a_cut_model_are_what_cutting_to_them_at_once_gives(
    model: PreTrainedModel, data: st.DataObject, fold: bool, by: str
) -> None:
    tie = (
        data.draw(st.sampled_from(["keep", "untie"]))
        if "rms_norm_eps" in model.config.to_dict()
        else "untie"
    )
    wide, layout = canonical_copy(model, fold, tie)
    names = subset(
        data, [n for n, s in layout.spaces.items() if fold or s.kind != "residual"], least=1
    )
    bases = share(elements(layout, names, data.draw(st.integers(0, 99))), segments(layout, by))
    heads = {n: segments(layout, by).get(n, n) for n in names}
    widths: list[dict[str, int]] = [{}, {}]
    for name in names:
        if next(n for n in names if heads[n] == heads[name]) != name:
            for found in widths:
                found[name] = found[next(n for n in names if heads[n] == heads[name])]
            continue
        space = layout.spaces[name]
        fit = [k for k in range(1, space.dim + 1) if space.fits(k)]
        widths[0][name] = data.draw(st.sampled_from(fit), label=f"width of {name}")
        widths[1][name] = data.draw(
            st.sampled_from([k for k in fit if k <= widths[0][name]]), label="narrower"
        )
    narrow, _ = canonical_copy(model, fold, tie)
    reparametrize(narrow, layout, cut(layout, bases, widths[1]))
    reparametrize(wide, layout, cut(layout, bases, widths[0]))
    now = label(wide)
    reparametrize(wide, now, first(now, widths[1]))
    ids = tokens()
    assert relative_error(logits(narrow, ids), logits(wide, ids)) <= tolerance(F64, layout.depth)
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (narrow, wide)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["residual", "mlp", "vo"])
def test_other_directions_than_the_first_are_another_model(family: str, kind: str) -> None:
    found = []
    for keep in (first, last):
        model, layout = canonical_copy(model_of(family), True, "untie")
        names = layout.select([kind])
        bases = share(elements(layout, names, 1), segments(layout, "all"))
        reparametrize(
            model, layout, cut(layout, bases, {n: layout.spaces[n].dim - 2 for n in names})
        )
        now = label(model)
        reparametrize(model, now, keep(now, {n: now.spaces[n].dim - 2 for n in names}))
        found.append(logits(model, IDS))
    assert relative_error(*found) > 1000 * tolerance(F64, layout.depth)


def test_a_slicer_that_says_that_its_cuts_are_prefixes_makes_such_cuts_and_one_that_refits_does_not() -> (
    None
):
    space = Space("mlp.0", "mlp", 6, find("rotate", "permute").produces)
    g = torch.Generator().manual_seed(0)
    C = torch.randn(6, 20, generator=g, dtype=F64)
    seen = Statistic.SEEN.on(space)
    moments = Moments(
        {
            ("mlp.0", seen): Moment((C @ C.T)[None], 20),
            ("mlp.0", Statistic.MEAN): Moment(C.sum(1)[None], 20),
        }
    )
    basis = Basis(torch.eye(6, dtype=F64)[None], torch.arange(6, 0, -1, dtype=F64)[None])
    nests = {}
    for name, slicer in registry("slice").items():
        wide, narrow = (slicer().cut(space, basis, k, moments) for k in (5, 3))
        same = torch.equal(wide.encode.matrix()[..., :3], narrow.encode.matrix()) and torch.equal(
            wide.decode.matrix()[..., :3], narrow.decode.matrix()
        )
        nests[name] = same and wide.offset is None
        assert nests[name] or not slicer.prefix, name
    assert nests["truncate"] and find("slice", "truncate").prefix
    assert not nests["least_squares"] and not nests["bias_compensation"]


# --- From a recipe.


def recipe(
    *steps: Mapping[str, Any], budget: Mapping[str, float] = {"parameters": 0.9}, **keys: Any
) -> Recipe:
    found = {"data": "tokens.npy", "dtype": "float32", "batch": 4}
    return Recipe.from_dict(
        {"model": "m", "calibrate": found, "steps": list(steps), "budget": dict(budget)} | keys
    )


def made(asked: Recipe, model: PreTrainedModel, evaluate: bool = False) -> Outcome:
    return outcome(model, asked, evaluate=evaluate, extras=False)


def member(
    model: PreTrainedModel, share: float, dtype: torch.dtype = F32
) -> tuple[PreTrainedModel, str]:
    assert isinstance(model, InvarianceForCausalLM)
    found, why = extract(model, share)
    cast(found, dtype)
    return found, why


@dataclass(frozen=True)
class Case:
    """A recipe with a nested family, of a tiny model, and whether a member of it is stock."""

    family: str
    steps: tuple[Mapping[str, Any], ...]
    stock: bool
    budget: str = "parameters"
    shares: tuple[float, float, float] = (0.9, 0.8, 0.65)
    model: tuple[tuple[str, Any], ...] = ()
    keys: tuple[tuple[str, Any], ...] = ()


QK = {"spaces": "qk", "rotate": {"rope_pairs": {"per": "model"}}, "select": "uniform"}
VO = {"spaces": "vo", "rotate": "head_svd", "select": "uniform", "widths": {"multiple_of": 2}}
DEPTH = {"spaces": ["heads", "mlp"], "select": "shortgpt", "widths": {"min": 0}}
CASES = {
    "mlp": Case("llama", (MLP,), stock=True),
    "stream": Case("llama", (STREAM,), stock=True, shares=(0.95, 0.9, 0.7)),
    "stream and mlp": Case("llama", (STREAM, MLP), stock=True),
    "tied": Case("llama", (STREAM, MLP), stock=False, keys=(("tie", "keep"),)),
    "blocks": Case(
        "llama", (STREAM | {"segments": "block"}, MLP), stock=False, shares=(0.95, 0.9, 0.75)
    ),
    "frequency pairs": Case(
        "llama", (QK, VO), stock=True, budget="kv_cache", shares=(0.8, 0.5, 0.3)
    ),
    "groups": Case(
        "llama",
        ({"spaces": "heads", "rotate": "permute", "select": "uniform"},),
        stock=True,
        budget="kv_cache",
        shares=(0.75, 0.5, 0.25),
        model=(("num_attention_heads", 8), ("num_key_value_heads", 4)),
    ),
    "depth": Case(
        "llama", (DEPTH,), stock=True, shares=(0.8, 0.6, 0.4), model=(("num_hidden_layers", 4),)
    ),
    "layer norm": Case("opt", (STREAM, MLP), stock=False),
    "parallel": Case("phi", (STREAM, MLP), stock=False),
}


@cache
def of_case(name: str) -> tuple[Outcome, dict[float, Outcome]]:
    """The family, and the models that recipes of one budget make."""
    case = CASES[name]
    model = model_of(case.family, **dict(case.model))
    widest, *others = case.shares
    family = made(
        recipe(*case.steps, budget={case.budget: widest}, nested=others, **dict(case.keys)), model
    )
    alone = {
        s: made(recipe(*case.steps, budget={case.budget: s}, **dict(case.keys)), model)
        for s in case.shares
    }
    return family, alone


@pytest.mark.parametrize("name", CASES)
def test_a_member_is_the_model_that_a_recipe_of_its_budget_makes(name: str) -> None:
    family, alone = of_case(name)
    depth = len(family.report["widths"])
    for at, (share_, other) in enumerate(alone.items()):
        found, why = member(family.model, share_)
        told = family.report["nested"][at]
        assert told["widths"] == other.report["widths"]
        assert (
            (not why)
            == other.report["model"]["stock"]
            == (told["why_not_stock"] is None)
            == CASES[name].stock
        )
        assert type(found) is type(other.model)
        assert stored(found) == stored(other.model) == told["parameters"]["total"]
        assert relative_error(logits(other.model, IDS), logits(found, IDS)) <= tolerance(F32, depth)
        ours, theirs = found.state_dict(), other.model.state_dict()
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
        assert all(
            relative_error(t, ours[n]) <= tolerance(F32, 0) for n, t in theirs.items() if t.any()
        )
    widths = [sum(each["widths"].values()) for each in family.report["nested"]]
    assert widths[0] > widths[1] > widths[2]
    widest, narrowest = (
        logits(alone[s].model, IDS) for s in (CASES[name].shares[0], CASES[name].shares[2])
    )
    assert relative_error(widest, narrowest) > 100 * tolerance(F32, depth)


def test_extraction_leaves_the_family_as_it_is_and_no_family_in_what_it_makes() -> None:
    family, _ = of_case("stream and mlp")
    before = {n: p.clone() for n, p in family.model.named_parameters()}
    found, _ = member(family.model, 0.65)
    assert not isinstance(found, InvarianceForCausalLM)
    assert all(torch.equal(before[n], p) for n, p in family.model.named_parameters())
    ours, _ = member(of_case("tied")[0].model, 0.65)
    assert ours.config.form.nested == {}
    with pytest.raises(
        InputError, match=r"no member has the share 0\.7\. There are 0\.9, 0\.8, 0\.65"
    ):
        extract(family.model, 0.7)


SPENDS = [
    n for n, s in registry("select").items() if s().needs_budget and n not in ("shortgpt", "sleb")
]


@pytest.mark.parametrize("name", SPENDS)
def test_no_selector_gives_a_narrower_member_more_of_a_space(name: str) -> None:
    steps = [STREAM | {"select": name}, MLP | {"select": name}, VO | {"select": name}]
    family = made(recipe(*steps, nested=[0.8, 0.7, 0.6]), model_of("llama"))
    widths = [each["widths"] for each in family.report["nested"]]
    budgets = [0.9, 0.8, 0.7, 0.6]
    dense = family.report["parameters"]["dense"]["total"]
    for wider, narrower in pairwise(widths):
        assert all(narrower[n] <= k for n, k in wider.items())
    for each, budget in zip(family.report["nested"], budgets, strict=True):
        assert each["parameters"]["total"] <= budget * dense


@dataclass(frozen=True)
class Alternating(Selector):
    """One MLP wide and the other narrow; which is which depends on the budget."""

    name = "alternating"
    minds: bool = True
    needs_budget = True

    def allocate(self, spectra: Any, cost: Bill, budget: float | None) -> Mapping[Space, int]:
        assert budget is not None
        a, b = cost.widths
        order = (a, b) if int(budget) % 2 else (b, a)
        found = {}
        for space, k in zip(order, (40, 8), strict=True):
            found[space] = min(k, cost.widths[space][-1]) if self.minds else k
        return found


def test_a_selector_that_would_choose_other_spaces_is_held_to_the_wider_member_or_refused() -> None:
    @dataclass(frozen=True)
    class Registered(Alternating, name="alternating"):
        """For this test alone."""

    dense = model_of("llama")
    total = stored(dense)
    odd, even = ((total * 8 // 10) | 1, (total * 7 // 10) & ~1)
    shares = (odd + 0.5) / total, (even + 0.5) / total

    def widths(minds: bool) -> list[dict[str, int]]:
        step = MLP | {"select": {"alternating": {"minds": minds}}}
        asked = recipe(step, budget={"parameters": shares[0]}, nested=[shares[1]])
        return [each["widths"] for each in made(asked, dense).report["nested"]]

    wider, narrower = widths(minds=True)
    assert (wider["mlp.0"], wider["mlp.1"]) == (40, 8) and (
        narrower["mlp.0"],
        narrower["mlp.1"],
    ) == (8, 8)
    with pytest.raises(
        InputError, match=r"gave space 'mlp\.1' the width 40 in a narrower member.*has 8"
    ):
        widths(minds=False)


REFUSED = {
    "no budget": ("0.9}", "0.9}", "nested", "one resource"),
    "two budgets": ("{parameters: 0.9}", "{parameters: 0.9, flops: 0.9}", "nested", "one resource"),
    "not below the widest": (
        "[0.8, 0.7]",
        "[0.95]",
        "nested",
        "0.95 is not below 0.9, the budget's own",
    ),
    "not falling": ("[0.8, 0.7]", "[0.7, 0.8]", "nested", "0.8 is not below 0.7, the one before"),
    "none": ("[0.8, 0.7]", "[]", "nested", "at least one item"),
    "another order": (
        "seed: 0",
        "order: sequential",
        "nested",
        "'sequential' fits bases behind the cuts",
    ),
    "towards the dense stream": (
        "seed: 0",
        "order: dense_target",
        "nested",
        "Use `order: oneshot`",
    ),
    "a slicer that refits": (
        "truncate",
        "least_squares",
        "slice",
        "'least_squares' refits for one width",
    ),
    "biases": ("truncate", "bias_compensation", "slice", "weights that all widths share"),
    "a share that no widths meet": ("[0.8, 0.7]", "[0.8, 0.1]", "nested", "cannot be met"),
}
ASKED = """\
model: m
calibrate: {data: tokens.npy}
seed: 0
budget: {parameters: 0.9}
nested: [0.8, 0.7]
steps:
  - spaces: mlp
    rotate: permute
    select: uniform
    slice: truncate
"""


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_nest_is_refused_at_its_line(name: str) -> None:
    old, new, key, why = REFUSED[name]
    text = ASKED.replace(old, new)
    if name == "no budget":
        text = text.replace("budget: {parameters: 0.9}", "").replace(
            "uniform", "{uniform: {keep: 0.5}}"
        )
    line = next(n for n, row in enumerate(text.splitlines(), 1) if f"{key}:" in row)
    plan(parse_recipe(ASKED, "r.yaml"), model_of("llama").config)
    with pytest.raises(InputError) as e:
        plan(parse_recipe(text, "r.yaml"), model_of("llama").config)
    assert str(e.value).startswith(f"r.yaml:{line}: ") and why in str(e.value)


# --- On disk.


@pytest.fixture(scope="module")
def root(data: None) -> Path:
    """A folder with a model and the family that a run has made of it."""
    save_model(Path("dense"))
    Path("family.yaml").write_text(
        "model: dense\ncalibrate: {data: tokens.npy, dtype: float32}\nbudget: {parameters: 0.9}\nnested: [0.8, 0.6]\n"
        "steps:\n"
        "  - {spaces: residual, rotate: pca, select: uniform, widths: {multiple_of: 4}}\n"
        "  - {spaces: mlp, rotate: permute, select: uniform}\n"
        "evaluate: [{perplexity: {data: tokens.npy, name: tokens}}]\n"
    )
    status, _, err = invoke("run", "family.yaml", "--output", "family", "--json")
    assert status == 0, err
    return Path.cwd()


def document(*arguments: object) -> Any:
    status, out, err = invoke(*arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_a_member_is_extracted_as_a_stock_checkpoint_with_its_own_report(root: Path) -> None:
    told = document("extract", root / "family", "--width", 0.6, "-o", root / "narrow")
    found = AutoModelForCausalLM.from_pretrained(root / "narrow" / "model")
    assert type(found).__module__.startswith("transformers.")
    report, whole = (
        json.loads((root / f / "report.json").read_text()) for f in ("narrow", "family")
    )
    assert report.keys() == whole.keys()
    assert (
        told["parameters"]
        == stored_numbers(root / "narrow" / "model")
        == report["parameters"]["sliced"]["total"]
    )
    assert report["parameters"]["sliced"]["total"] <= 0.6 * report["parameters"]["dense"]["total"]
    assert (
        report["model"]["stock"]
        and not whole["model"]["stock"]
        and "3 nested" in whole["model"]["why_not_stock"]
    )
    again = document("evaluate", root / "narrow" / "model", "--data", "tokens.npy")["perplexity"]
    (measured,) = again.values()
    ours = report["perplexity"]["tokens"]["sliced"]
    assert abs(measured["model"] - ours) <= ours * tolerance(F32, 4) * 10
    assert abs(ours - whole["perplexity"]["tokens"]["sliced"]) > 1e-3 * ours  # that of the widest
    card = (root / "narrow" / "model" / "README.md").read_text()
    kind = report["model"]["exported_as"]
    assert f"ordinary '{kind}' checkpoint" in card and "--width 0.6" in card
    assert "Nested members" in (root / "family" / "model" / "README.md").read_text()
    assert "Nested members" in (root / "family" / "report.html").read_text()
    assert {p.name for p in (root / "narrow").iterdir()} == {
        "model",
        "README.md",
        "basis.safetensors",
        "extract.json",
        "figures",
        "manifest.json",
        "recipe.yaml",
        "report.html",
        "report.json",
        "spectra.json",
    }


def test_the_widest_member_computes_what_the_family_does(root: Path) -> None:
    document("extract", root / "family" / "model", "--width", 0.9, "--output", root / "widest")
    whole, found = (
        AutoModelForCausalLM.from_pretrained(root / f / "model") for f in ("family", "widest")
    )
    assert isinstance(whole, InvarianceForCausalLM) and not isinstance(found, InvarianceForCausalLM)
    assert relative_error(logits(whole, IDS), logits(found, IDS)) <= tolerance(F32, 4)


def test_a_members_basis_is_the_first_directions_of_the_familys(root: Path) -> None:
    document("extract", root / "family", "--width", 0.8, "-o", root / "middle")
    whole, found = (load_file(root / f / "basis.safetensors") for f in ("family", "middle"))
    (E,), (narrow,) = whole.values(), found.values()
    k = json.loads((root / "middle" / "report.json").read_text())["widths"]["x.0.0"]
    assert narrow.shape == (32, k) and k < E.shape[1] and torch.equal(E[:, :k], narrow)


def test_without_a_report_a_checkpoint_is_extracted_all_the_same(root: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / "family" / "model")
    model.save_pretrained(root / "bare")
    told = document("extract", root / "bare", "--width", 0.8, "-o", root / "bare-0.8")
    assert told["why_not_stock"] is None and not (root / "bare-0.8" / "report.json").exists()
    page = (root / "bare-0.8" / "model" / "README.md").read_text()
    assert page.startswith("---\n") and "## Licence" in page and f"{told['parameters']:,}" in page


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (
            ("family", "--width", "0.7", "-o", "x"),
            r"--width 0.7: no member has the share 0.7. There are 0.9, 0.8, 0.6.",
        ),
        (("dense", "--width", "0.8", "-o", "x"), "holds one model, no nested ones"),
        (("gone", "--width", "0.8", "-o", "x"), "no such folder"),
        (("family", "--width", "0.8", "-o", "family"), "--overwrite"),
        (("family", "--width", "0.8", "-o", "dense", "--overwrite"), "no manifest.json says"),
    ],
)
def test_a_member_that_cannot_be_is_refused(
    root: Path, arguments: tuple[str, ...], why: str
) -> None:
    status, out, err = invoke("extract", *arguments)
    assert status == 2 and not out and "Traceback" not in err
    assert why in " ".join(err.split())
    assert not (root / "x").exists()


def test_a_plan_shows_what_members_keep(root: Path) -> None:
    found = document("plan", "family.yaml")["nested"]
    assert list(found) == ["0.8", "0.6"]
    report = json.loads((root / "family" / "report.json").read_text())["nested"]
    assert [found[s]["total"] for s in found] == [
        each["parameters"]["total"] for each in report[1:]
    ]


def test_a_run_without_members_has_none() -> None:
    report = made(recipe(MLP), model_of("llama")).report
    assert report["nested"] is None and report["member"] is None
    assert plan(recipe(MLP), model_of("llama").config).narrower() == {}
