"""Evaluation: windows that overlap count every token once, divergence, tasks of lm-eval, and what is significant."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import WORDS, invoke, model_of, save_model, save_tokens, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from invariance.core.errors import InputError
from invariance.io.data import Amount, Tokens, load_tokens
from invariance.measure import losses, tasks
from invariance.measure.evaluate import Evaluation, measure, prepare
from invariance.measure.losses import Mean, buckets, divergence, scored, token_losses
from invariance.measure.trust import trusting
from invariance.model.verify import tolerance
from invariance.recipe.evaluate import Tasks
from invariance.recipe.recipe import parse_recipe
from invariance.report import evaluations
from invariance.report.document import Measured
from invariance.report.reading import checked
from invariance.report.units import NONE

TASKS = Path(__file__).parent / "tasks"
VOCABULARY = 41
SINGLE = tolerance(torch.float32, 8)  # of a loss in float32, two layers and a head


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("evaluate")
    save_model(root / "dense")
    save_model(root / "sliced", intermediate_size=48)
    save_tokens(root / "tokens.npy")
    g = np.random.default_rng(0)
    (root / "text.txt").write_text(" ".join(g.choice(WORDS, 200)))
    with pytest.MonkeyPatch.context() as patch, trusting():
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(root)
        yield root


def some(seed: int = 0, windows: int = 6, length: int = 40) -> Tokens:
    ids = torch.randint(
        1, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed)
    )
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def of_text(root: Path, **options: Any) -> Tokens:
    asked = Amount(**options)
    return load_tokens(str(root / "text.txt"), tokenizer(), vocab_size=VOCABULARY, amount=asked)


# --- Windows and strides.


@given(st.integers(2, 12), st.integers(1, 12), st.integers(1, 6))
def test_windows_that_overlap_count_every_token_once(
    root: Path, window: int, stride: int, count: int
) -> None:
    if stride >= window:
        return
    found = of_text(root, sequences=count, tokens=window, stride=stride)
    stream = tokenizer()((root / "text.txt").read_text()).input_ids
    counted = scored(found, stride)
    assert found.ids[:, 1:][counted].tolist() == stream[1 : (count - 1) * stride + window]
    if count > 1 and stride < window - 1:  # without the stride tokens would count twice
        assert int(scored(found).sum()) > int(counted.sum())


def test_a_loss_in_an_overlapping_window_is_that_behind_all_its_context(root: Path) -> None:
    model, found = model_of("llama"), of_text(root, sequences=5, tokens=12, stride=4)
    each = token_losses(model, found, batch=2)
    for row, start in enumerate(range(0, 20, 4)):
        ids = torch.tensor(
            tokenizer()((root / "text.txt").read_text()).input_ids[start : start + 12]
        )
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        expected = -logits[:-1].gather(1, ids[1:, None])[:, 0]
        assert torch.allclose(
            each[row].double(), expected, rtol=0, atol=SINGLE * float(expected.max())
        )
    assert not torch.allclose(
        each[0, 4:], each[1, :-4], rtol=0, atol=100 * SINGLE
    )  # context matters


def test_windows_without_overlap_are_those_without_a_stride(root: Path) -> None:
    plain, same = (of_text(root, sequences=4, tokens=10, stride=s) for s in (None, 10))
    assert torch.equal(plain.ids, same.ids) and torch.equal(scored(plain), scored(same, 10))


@pytest.mark.parametrize(
    ("data", "stride", "told"),
    [
        ("text.txt", 11, "skips tokens between windows of 10"),
        ("tokens.npy", 4, "are windows already"),
    ],
)
def test_a_stride_that_cannot_be_is_refused(root: Path, data: str, stride: int, told: str) -> None:
    asked = Amount(4, 10, stride)
    with pytest.raises(InputError, match=told):
        load_tokens(str(root / data), tokenizer(), vocab_size=VOCABULARY, amount=asked)


# --- Means and divergences.


def test_a_standard_error_is_that_of_the_windows_means_where_they_are_equally_long() -> None:
    values = torch.randn(9, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Mean.over(values, torch.ones(9, 13, dtype=torch.bool))
    means = values.mean(1).numpy()
    assert found.value == pytest.approx(means.mean(), rel=1e-12)
    assert found.standard_error == pytest.approx(means.std(ddof=1) / 3, rel=1e-9)
    assert found.standard_error != pytest.approx(
        values.std().item() / values.numel() ** 0.5, rel=1e-3
    )
    assert Mean.over(values[:1], torch.ones(1, 13, dtype=torch.bool)).standard_error is None


def test_what_is_not_counted_has_no_say_even_where_it_is_no_number() -> None:
    values = torch.tensor([[1.0, math.nan], [3.0, 5.0]])
    counted = torch.tensor([[True, False], [True, True]])
    assert Mean.over(values, counted).value == 3.0
    assert math.isnan(Mean.over(values, torch.ones_like(counted)).value)


@given(st.integers(1, 3000))
def test_buckets_hold_every_position_once(width: int) -> None:
    found = buckets(width)
    assert [n for first, last in found for n in range(first, last + 1)] == list(range(1, width + 1))
    assert all(first == 1 or first & (first - 1) == 0 for first, _ in found)


def test_a_model_does_not_diverge_from_itself_and_another_does() -> None:
    model, other = model_of("llama"), model_of("llama", seed=1)
    same = divergence(model, model, some()).to_dict()
    assert same["kl"] == 0 and same["agreement"] == 1 and same["extra_loss"] == 0
    found = divergence(model, other, some()).to_dict()
    assert found["kl"] > 0.01 and found["agreement"] < 1


def test_a_divergence_is_what_numpy_makes_of_the_logits() -> None:
    model, other, tokens = model_of("llama"), model_of("llama", seed=1), some()
    with torch.no_grad():
        p, q = (
            m(input_ids=tokens.ids).logits[:, :-1].double().log_softmax(-1).numpy()
            for m in (model, other)
        )
    found = divergence(model, other, tokens, batch=4)
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert np.abs(found.kl.numpy() - kl).max() < SINGLE * np.abs(p).max()
    assert found.agreement.mean() == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    whole = found.to_dict()
    parts = whole["positions"]
    assert [(b["from"], b["to"]) for b in parts] == [(1, 15), (16, 31), (32, 39)]
    assert sum(b["tokens"] for b in parts) == whole["tokens"] == 6 * 39
    assert parts[1]["kl"] == pytest.approx(kl[:, 15:31].mean(), rel=1e-4)
    assert parts[1]["kl"] != pytest.approx(kl[:, 16:32].mean(), rel=1e-4)


def test_the_extra_loss_is_the_logarithm_of_the_ratio_of_perplexities() -> None:
    model, other, tokens = model_of("llama"), model_of("llama", seed=1), some()
    extra = divergence(model, other, tokens).to_dict()["extra_loss"]
    ratio = losses.perplexity(other, tokens) / losses.perplexity(model, tokens)
    assert extra == pytest.approx(math.log(ratio), abs=SINGLE * 10)


# --- Significance.


def test_right_and_wrong_answers_are_compared_by_an_exact_sign_test() -> None:
    before = dict(enumerate([1.0] * 9 + [0.0] * 3 + [1.0] * 20))
    after = dict(enumerate([0.0] * 9 + [1.0] * 3 + [1.0] * 20))
    found = tasks.paired(before, after)
    assert found is not None
    assert found.difference == -6 / 32
    assert found.p == pytest.approx(2 * sum(math.comb(12, k) for k in range(4)) / 2**12)
    same = tasks.paired(before, before)
    assert same is not None and same.p == 1.0


def test_other_scores_are_compared_by_a_paired_t_test_on_the_questions_that_both_have() -> None:
    g = np.random.default_rng(0)
    a, b = g.normal(size=20), g.normal(size=20)
    found = tasks.paired(dict(enumerate(a)), {**dict(enumerate(b)), 99: 7.0})
    assert found is not None
    assert found.p == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert found.standard_error == pytest.approx(stats.sem(b - a))


def test_scores_of_all_questions_at_once_differ_by_what_lies_between_them() -> None:
    def found(perplexity: float) -> dict[str, Any]:
        sample = {
            "doc_id": 0,
            "filter": "none",
            "metrics": ["word_perplexity"],
            "word_perplexity": (-9.0, 4),
        }
        results = {
            "alias": "t",
            "word_perplexity,none": perplexity,
            "word_perplexity_stderr,none": "N/A",
        }
        return {
            "results": {"t": results},
            "samples": {"t": [sample]},
            "n-shot": {"t": 0},
            "n-samples": {"t": {"effective": 1}},
        }

    def told(after: float) -> tuple[dict[str, Any], list[str]]:
        rows = tasks.rows({"dense": found(8.0), "sliced": found(after)})
        (grid,) = evaluations.tasks(checked(Measured, {"tasks": rows}, "here"))
        scores = [row[5:] for row in grid.rows]
        return rows[0]["difference"]["sliced"], [scores[0][0], *scores[1][:-1]]

    known, words = told(9.5)
    assert known == {"difference": 1.5, "standard_error": None, "p": None, "significant": None}
    assert words == ["8.000", "9.500", "+1.500", NONE]
    assert told(math.nan)[1] == ["8.000", NONE, NONE, NONE]


def test_significance_is_decided_over_all_rows() -> None:
    found: list[dict[str, Any]] = [{"p": p} for p in (0.03, 0.001, None, 0.02)]
    tasks.mark(found)
    assert [d["significant"] for d in found] == [True, True, None, True]
    found = [{"p": p} for p in (0.03, 0.001, 0.04, 0.9)]  # alone, the first would be
    tasks.mark(found)
    assert [d["significant"] for d in found] == [False, True, False, False]


@dataclass(frozen=True, eq=False)
class Scored(Evaluation):
    """Tasks whose scores are known."""

    p: float
    kind = "tasks"

    def measure(self, models: Any, progress: Any, memo: Any = None) -> list[Any]:
        difference = {"p": self.p}
        tasks.mark([difference])
        return [{"task": "t", "difference": {"sliced": difference}}]


def test_significance_is_decided_over_all_entries_of_a_run() -> None:
    def significant(*ps: float) -> list[bool]:
        rows = measure([Scored(p) for p in ps], {})["tasks"]
        return [row["difference"]["sliced"]["significant"] for row in rows]

    assert significant(0.03) == [True]  # the control
    assert significant(0.03, 0.03) == [False, False]
    assert significant(0.03, 0.01) == [True, True]


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("before", [None, "0"])
def test_programs_run_where_the_user_said_so_alone(
    allowed: bool, before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(tasks.ALLOWED, raising=False)
    if before is not None:
        monkeypatch.setenv(tasks.ALLOWED, before)
    with tasks._programs(allowed):
        assert os.environ.get(tasks.ALLOWED) == ("1" if allowed else before)
    assert os.environ.get(tasks.ALLOWED) == before


# --- Tasks.


def task_rows(root: Path, part: Tasks) -> list[dict[str, Any]]:
    dense, sliced = model_of("llama"), model_of("llama", intermediate_size=48)
    entry = prepare(part, "tasks", dense.config, tokenizer(), "here")
    return measure([entry], {"dense": dense, "sliced": sliced})["tasks"]


def test_local_tasks_run_without_a_hub_dense_beside_sliced(root: Path) -> None:
    pytest.importorskip("lm_eval", reason="tasks need the extra eval")
    found = task_rows(root, Tasks(names=(str(TASKS / "capitals.yaml"), str(TASKS / "apples.yaml"))))
    assert {(r["task"], r["metric"]) for r in found} == {
        ("capitals", "acc"),
        ("capitals", "acc_norm"),
        ("apples", "exact_match"),
    }
    for row in found:
        assert row["questions"] == {"capitals": 12, "apples": 6}[row["task"]] and row["shots"] == 0
        difference = row["difference"]["sliced"]
        assert difference["difference"] == pytest.approx(
            row["sliced"]["value"] - row["dense"]["value"]
        )
        assert 0 <= difference["p"] <= 1 and difference["significant"] in (True, False)
    scores = [r["dense"]["value"] for r in found if r["metric"] == "acc"]
    assert 0 <= scores[0] <= 1 and found[0]["dense"]["standard_error"] is not None


def test_a_task_asks_no_more_questions_than_its_limit_and_leaves_the_model_alone(
    root: Path,
) -> None:
    pytest.importorskip("lm_eval", reason="tasks need the extra eval")
    model, words = model_of("llama"), tokenizer()
    before = {n: p.clone() for n, p in model.named_parameters()}
    part = Tasks(names=(str(TASKS / "capitals.yaml"),), limit=3)
    entry = prepare(part, "tasks", model.config, words, "here")
    (row, _) = measure([entry], {"model": model})["tasks"]
    assert row["questions"] == 3 and row["difference"] == {}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not model.training and vars(words).keys() == vars(tokenizer()).keys()


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("gone.yaml",), "gone.yaml: there is no such file"),
        (("hellaswg",), "did you mean 'hellaswag'?"),
        (("piqa",), "task piqa cannot be read"),
        (("broken.yaml",), "task broken.yaml cannot be read"),
    ],
)
def test_a_task_that_cannot_be_is_refused(root: Path, names: tuple[str, ...], told: str) -> None:
    pytest.importorskip("lm_eval", reason="tasks need the extra eval")
    (root / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\noutput_type: generate_until\n"
    )
    with pytest.raises(InputError, match=f"here.*{told}".replace("?", r"\?")):
        tasks.load(Tasks(names=names), "here")


def test_programs_of_the_model_are_run_only_where_that_was_said(root: Path) -> None:
    pytest.importorskip("lm_eval", reason="tasks need the extra eval")
    text = (TASKS / "apples.yaml").read_text().replace("apples.jsonl", str(TASKS / "apples.jsonl"))
    (root / "unsafe.yaml").write_text(text + "unsafe_code: true\n")
    with pytest.raises(InputError, match="runs programs that the model writes"):
        tasks.load(Tasks(names=("unsafe.yaml",)), "here")
    assert len(tasks.load(Tasks(names=("unsafe.yaml",), run_code=True), "here")) == 1


def test_groups_are_of_tasks_that_lm_eval_has() -> None:
    pytest.importorskip("lm_eval", reason="tasks need the extra eval")
    named = {name for group in tasks.GROUPS.values() for name in group} | {"gsm8k", "humaneval"}
    assert named <= set(tasks.index(True).all_tasks)
    assert len(tasks.GROUPS["article"]) == 7


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    tasks.index.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'invariance\[eval\]'"):
        tasks.load(Tasks(names=("piqa",)), "here")


# --- Recipes and the command.

RECIPE = """\
model: dense
calibrate: {data: tokens.npy, dtype: float32}
steps: [{spaces: mlp, rotate: permute, select: {uniform: {keep: 0.5}}}]
evaluate:
  - perplexity: {data: tokens.npy, name: first}
  - perplexity: {data: text.txt, sequences: 3, tokens: 20, stride: 5}
  - divergence: {data: tokens.npy}
  - samples: {prompts: The people, tokens: 3}
"""


def test_a_run_reports_every_evaluation_of_its_recipe(root: Path) -> None:
    (root / "recipe.yaml").write_text(RECIPE)
    status, out, err = invoke("run", "recipe.yaml", "--json", "--output", "made")
    assert status == 0, err
    report = json.loads(out)
    assert report["perplexity"]["first"]["window"] == report["perplexity"]["first"]["stride"] == 16
    strided = report["perplexity"]["text.txt"]
    assert (strided["window"], strided["stride"], strided["tokens"]) == (20, 5, 19 + 2 * 5)
    found = report["divergence"]["tokens.npy"]
    extra = report["perplexity"]["first"]["extra_loss"]["sliced"]
    assert found["sliced"]["extra_loss"] == pytest.approx(extra["value"], abs=SINGLE * 10)
    assert found["sliced"]["kl"] > 0 and found["reference"] == "dense"
    assert [s["prompt"] for s in report["samples"]] == ["The people"]
    page = (root / "made/report.html").read_text()
    assert "window 20, stride 5" in page and "Predictions, token by token" in page


def test_a_text_that_is_longer_than_the_models_positions_is_refused_before_anything_is_computed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(root / "short", "opt", max_position_embeddings=40)
    recipe = RECIPE.replace("model: dense", "model: short")
    (root / "short.yaml").write_text(recipe.replace("tokens: 3}", "tokens: 39}"))
    with monkeypatch.context() as patch:
        patch.setattr(
            "invariance.run.run.load_model", lambda *_a, **_k: pytest.fail("read the weights")
        )
        status, _, err = invoke("run", "short.yaml", "--output", "long")
    said = " ".join(err.split())
    assert (
        status == 2
        and "short.yaml:8" in said
        and "41 tokens, and the model has 40 positions" in said
    )
    status, _, err = invoke("evaluate", "short", "--prompt", "The people")
    assert status == 2 and "40 positions" in err
    (root / "short.yaml").write_text(
        recipe.replace("  - samples: {prompts: The people, tokens: 3}\n", "")
    )
    status, out, err = invoke("run", "short.yaml", "--output", "fits", "--json")
    assert status == 0, err  # the sample that nobody asked for takes the room that there is
    (text,) = json.loads(out)["samples"]
    assert len(text["prompt"].split()) + len(text["dense"].split()) <= 40


def test_the_command_sets_a_model_against_another(root: Path) -> None:
    flags = (
        "--against",
        "dense",
        "--data",
        "a=tokens.npy",
        "--data",
        "tokens.npy",
        "--prompt",
        "The people",
    )
    status, out, err = invoke("evaluate", "sliced", *flags, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert set(found["perplexity"]) == set(found["divergence"]) == {"a", "tokens.npy"}
    assert found["models"] == {"dense": "dense", "sliced": "sliced"}
    assert set(found["samples"][0]) == {"prompt", "dense", "sliced"}
    status, out, err = invoke("evaluate", "sliced", *flags)
    assert status == 0 and "window 16" in out and "same first choice" in out, err


def test_the_command_measures_what_a_recipe_says(root: Path) -> None:
    (root / "recipe.yaml").write_text(RECIPE)
    flags = ("evaluate", "sliced", "--recipe", "recipe.yaml", "--json")
    status, out, err = invoke(*flags, "--against", "dense")
    assert status == 0, err
    found = json.loads(out)
    assert set(found["perplexity"]) == {"first", "text.txt"} and set(found["divergence"]) == {
        "tokens.npy"
    }
    status, out, err = invoke(
        *flags
    )  # a divergence of one model is none, and is not left out in silence
    assert status == 2 and out == "" and "recipe.yaml:7" in err and "--against DENSE" in err
    (root / "recipe.yaml").write_text(RECIPE.replace("  - divergence: {data: tokens.npy}\n", ""))
    status, out, err = invoke(*flags)
    assert status == 0 and json.loads(out)["divergence"] == {}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--data", "a=tokens.npy", "--data", "a=text.txt"), "'a' stands there twice"),
        (
            ("--data", "text.txt", "--tokens", "8", "--sequences", "2", "--stride", "9"),
            "skips tokens",
        ),
        (("--data", "tokens.npy", "--against", "wide"), "it has 50 tokens and sliced has 41"),
        (
            ("--data", "tokens.npy", "--against", "shuffled"),
            "2 of its tokens are others than those of sliced",
        ),
        (("--data", "tokens.npy", "--shots", "2"), "--shots: says how a --task is done"),
        (
            ("--prompt", "The people", "--sequences", "2"),
            "--sequences: says how the text of --data is read",
        ),
        (("--data", "tokens.npy", "--set", "seed=1"), "--set seed=1: changes the --recipe"),
        (
            ("--data", "tokens.npy", "--data", "a=text.txt", "--split", "train"),
            "--split: chooses of a hub dataset",
        ),
        (
            ("--recipe", "recipe.yaml", "--set", "evaluate=[]"),
            "--recipe recipe.yaml: it has no `evaluate`",
        ),
        (("--prompt", " "), "--prompt: an empty text"),
        (
            ("--data", "first=tokens.npy", "--recipe", "recipe.yaml"),
            "'first' is what --data measures too",
        ),
    ],
)
def test_flags_that_cannot_be_are_refused(root: Path, flags: tuple[str, ...], told: str) -> None:
    save_model(root / "wide", vocab_size=50)
    written = (save_model(root / "shuffled") / "tokenizer.json").read_text()
    swapped = (
        written.replace('"people"', '"x"')
        .replace('"States"', '"people"')
        .replace('"x"', '"States"')
    )
    (root / "shuffled" / "tokenizer.json").write_text(swapped)
    (root / "recipe.yaml").write_text(RECIPE)
    status, out, err = invoke("evaluate", "sliced", *flags)
    assert status == 2 and out == "" and told in " ".join(err.split())


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("{}", "this one has nothing"),
        ("{perplexity: {data: a}, samples: {}}", "this one has perplexity and samples"),
        ("{tasks: {names: []}}", "at least"),
        ("{tasks: {names: a, shots: -1}}", "greater than or equal to 0"),
        ("{samples: {prompts: a, tokens: 0}}", "greater than or equal to 1"),
        ("{divergence: {data: a, stride: 4}}", "unknown key 'stride'"),
    ],
)
def test_an_entry_that_cannot_be_is_refused_with_its_line(entry: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(f"model: m\nsteps: [{{spaces: mlp}}]\nevaluate: [{entry}]", "r.yaml")
    assert str(caught.value).startswith("r.yaml:3") and told in str(caught.value)
