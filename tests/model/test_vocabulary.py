"""Rows of rare tokens as two factors: exact at full rank, the best below it, stored and looked up as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import invoke
from transformers import AutoModelForCausalLM

from invariance import compress, load
from invariance.compress.planner import plan
from invariance.compress.vocabulary import factors_of
from invariance.core.errors import InputError
from invariance.io.checkpoint import wrap
from invariance.io.source import live
from invariance.model.canonical import canonicalize
from invariance.model.copies import double_copy
from invariance.model.families import architecture
from invariance.model.streamed import Streamed
from invariance.model.verify import relative_error, tolerance
from invariance.model.vocabulary import Head, Rows, Shape, Table, install, is_tied
from invariance.recipe.recipe import Recipe
from invariance.testing.tiny import VOCABULARY, tiny

IDS = torch.arange(VOCABULARY).repeat(2, 1)
FAMILIES = ["llama", "opt", "gemma3_text", "phi"]
SHAPE = Shape(common=9, rank=5)
NARROW = {
    "spaces": "residual",
    "rotate": "pca",
    "select": {"uniform": {"width": 8}},
    "slice": "truncate",
}


def recipe(vocabulary: dict[str, Any] | None, tokens: Path, **more: Any) -> Recipe:
    step = {"spaces": "mlp", "rotate": "permute", "select": {"uniform": {"width": 16}}}
    asked = {"vocabulary": vocabulary} if vocabulary else {}
    calibrate = {"data": str(tokens)}
    return Recipe.from_dict(
        {"model": "none", "calibrate": calibrate, "steps": [step], **asked, **more}
    )


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.RandomState(0).randint(0, VOCABULARY, (40, 32)))
    return path


def with_rows(family: str, shape: Shape, **options: Any) -> Any:
    """A restructured double copy of a tiny model with rows of two factors, and the layout it had."""
    model = double_copy(tiny(family, **options))
    layout = canonicalize(model, fold=False)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    eye = torch.eye(model.config.hidden_size, dtype=torch.float64)
    own = factors_of(table.weight.detach(), eye, shape)[0]
    other = None if is_tied(table, head) else factors_of(head.weight.detach(), eye, shape)[0]
    install(model, layout.architecture, own, other)
    return model, layout


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_full_rank_they_are_the_model_and_below_it_they_are_not(family: str, tied: bool) -> None:
    dense = double_copy(tiny(family, tie_word_embeddings=tied))
    expected = dense(IDS).logits
    for rank, same in ((16, True), (5, False)):
        model, _ = with_rows(family, Shape(9, rank), tie_word_embeddings=tied)
        assert is_tied(model.get_input_embeddings(), model.get_output_embeddings()) == tied
        error = (model(IDS).logits - expected).norm() / expected.norm()
        assert bool(error < tolerance(torch.float32, 4)) == same  # families' own norms are float32


@pytest.mark.parametrize("family", FAMILIES)
def test_they_compute_what_one_matrix_of_the_same_rows_does(family: str) -> None:
    model, _ = with_rows(family, SHAPE)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, Table) and isinstance(head, Head)
    x = torch.randn(3, 4, 16, dtype=torch.float64)
    bias = 0 if head.bias is None else head.bias
    torch.testing.assert_close(head(x), x @ head.weight.mT + bias)
    torch.testing.assert_close(table(IDS), table.weight[IDS] * table.scale)
    assert (table.scale != 1) == (family == "gemma3_text")


def test_no_other_directions_lose_less_in_the_metric() -> None:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(40, 12, generator=g, dtype=torch.float64)
    S = torch.randn(12, 12, generator=g, dtype=torch.float64)
    C = S @ S.mT
    (common, rare, basis), lost = factors_of(W, C, Shape(10, 4))
    assert torch.equal(common, W[:10])

    def loss(found: torch.Tensor) -> float:
        off = W[10:] - found
        return float(((off @ C) * off).sum() / ((W[10:] @ C) * W[10:]).sum())

    assert loss(rare @ basis) == pytest.approx(lost)
    singular = np.linalg.svd((W[10:] @ torch.linalg.cholesky(C)).numpy(), compute_uv=False)
    assert lost == pytest.approx((singular[4:] ** 2).sum() / (singular**2).sum())
    plain = factors_of(W, torch.eye(12, dtype=torch.float64), Shape(10, 4))[0]
    assert loss(plain[1] @ plain[2]) > 1.01 * lost  # the metric counts


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_holds_them_loads_and_writes_on(
    family: str, tied: bool, tokens: Path, tmp_path: Path
) -> None:
    dense = tiny(family, tie_word_embeddings=tied)
    asked = recipe({"common": 9, "rank": 5}, tokens)
    small = compress(dense, asked).eval()
    chart = plan(asked, dense.config)
    numbers = sum(p.numel() for p in small.parameters())
    assert numbers == chart.parameters(chart.allocate(None) or {}).total
    once = VOCABULARY * 16 - SHAPE.numbers(VOCABULARY, 16)
    without = sum(p.numel() for p in compress(dense, recipe(None, tokens)).parameters())
    assert without - numbers == once * (1 if tied else 2)
    small.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert isinstance(again.get_input_embeddings(), Rows)
    assert is_tied(again.get_input_embeddings(), again.get_output_embeddings()) == tied
    assert torch.equal(again(IDS).logits, small(IDS).logits)
    written = [
        again.generate(IDS[:, 1:4], max_new_tokens=4, do_sample=False, use_cache=c)
        for c in (False, True)
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize("tied", [True, False])
def test_a_walk_reads_their_products(tied: bool) -> None:
    model, layout = with_rows("llama", SHAPE, tie_word_embeddings=tied)
    small = wrap(model, layout, tiny("llama", tie_word_embeddings=tied).config, "untie")
    parts = Streamed(live(small), torch.float64)
    index = torch.tensor([0, 8, 9, 30, 3])
    for module, name in (
        (small.get_input_embeddings(), parts.table),
        (small.get_output_embeddings(), parts.table if tied else "lm_head.weight"),
    ):
        torch.testing.assert_close(parts.table_rows(name, index), module.weight[index].detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_gains_and_biases_fold_into_them(family: str) -> None:
    model, _ = with_rows(family, SHAPE)
    expected = model(IDS).logits
    layout = canonicalize(model, fold=True)
    assert layout.folded and layout.architecture == architecture(model.config)
    error = (model(IDS).logits - expected).norm() / expected.norm()
    assert error < tolerance(torch.float32, layout.depth)


@pytest.mark.parametrize(
    ("asked", "more", "words"),
    [
        ({"common": 31, "rank": 2}, {}, "all 31 tokens would keep rows of their own"),
        ({"common": 9, "rank": 12}, {}, "Give a rank of at most 9."),
        ({"common": 30, "rank": 1}, {}, "Give a smaller `common`."),
        ({"common": 9, "rank": 8}, {"steps": [NARROW]}, "Give a rank of at most 5."),
        ({"common": 9, "rank": 5}, {"stock": True}, "no stock checkpoint holds its factors"),
        ({"common": 9, "rank": 5}, {"quantize": {"bits": 4}}, "Set `quantize: {tables: null}`"),
        ({"common": 9, "rank": 5}, {"calibrate": None}, "there is no data"),
        ({"common": 0, "rank": 5}, {}, "common"),
    ],
)
def test_what_cannot_be_is_refused(
    asked: dict[str, Any], more: dict[str, Any], words: str, tokens: Path
) -> None:
    with pytest.raises(InputError) as told:
        plan(recipe(asked, tokens, **more), tiny("llama").config)
    assert words in str(told.value)
    plan(recipe({"common": 9, "rank": 5}, tokens), tiny("llama").config)  # and this one can


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("common", VOCABULARY, "common: 31 leaves no rare ones of 31 tokens"),
        ("rank", 17, "rank: 17 is more than the 16 of the dense model"),
        ("rank", True, "rank: got True, but it should be a valid integer"),
    ],
)
def test_a_config_that_cannot_be_is_refused(
    key: str, value: int, words: str, tmp_path: Path
) -> None:
    model, layout = with_rows("llama", SHAPE)
    small = wrap(model, layout, tiny("llama").config, "untie")
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["invariance"]["vocabulary"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, _, err = invoke("inspect", tmp_path)
    assert status == 2 and f"invariance.vocabulary.{words}" in " ".join(err.split())


@pytest.mark.parametrize("tied", [True, False])
def test_commands_and_doubtful_configs(tied: bool, tmp_path: Path) -> None:
    """A checkpoint is inspected; a config that ties what its files hold twice is not believed; no token can be added."""
    model, layout = with_rows("llama", SHAPE, tie_word_embeddings=tied)
    small = wrap(model, layout, tiny("llama", tie_word_embeddings=tied).config, "untie")
    small.config.tie_word_embeddings = True
    small.save_pretrained(tmp_path)
    again = load(str(tmp_path))
    assert is_tied(again.get_input_embeddings(), again.get_output_embeddings()) == tied
    error = relative_error(small(IDS).logits, again(IDS).logits)
    assert error < tolerance(torch.float32, layout.depth)
    status, out, _ = invoke("inspect", tmp_path, "--json")
    assert status == 0
    assert json.loads(out)["parameters"]["total"] == sum(p.numel() for p in small.parameters())
    with pytest.raises(InputError, match="no tokens can be added"):
        again.resize_token_embeddings(40)
