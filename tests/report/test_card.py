"""The model card: metadata that hubs read, code that loads, numbers of the report, the licence of the original."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import invoke, save_model, save_tokens
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from invariance.io.models import licence, origin
from invariance.recipe.recipe import load_recipe, parse_recipe
from invariance.report.card import card as card_of
from invariance.report.document import Report
from invariance.report.reading import checked

RECIPE = """\
model: dense
calibrate: {data: tokens.npy, dtype: float32}
steps: [{spaces: mlp, rotate: permute, select: {uniform: {keep: 0.5}}}]
evaluate: [{perplexity: {data: tokens.npy}}, {divergence: {data: tokens.npy}}]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("card")
    save_model(root / "dense")
    (root / "dense/README.md").write_text("---\nlicense: apache-2.0\n---\nA tiny model.\n")
    save_model(root / "bare")
    save_tokens(root / "tokens.npy")
    (root / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.chdir(root)
        status, _, err = invoke("run", "recipe.yaml", "--output", "made", "--json")
        assert status == 0, err
        yield root


def card(report: dict[str, Any]) -> str:
    return card_of(checked(Report, report, "report.json"))


def text(root: Path) -> str:
    return (root / "made/model/README.md").read_text()


def test_hubs_read_the_metadata(root: Path) -> None:
    found = ModelCard.load(root / "made/model/README.md").data.to_dict()
    assert found["license"] == "apache-2.0" and found["library_name"] == "transformers"
    assert "base_model" not in found  # a folder is no hub id


def test_the_card_says_what_the_report_says(root: Path) -> None:
    report, said = json.loads((root / "made/report.json").read_text()), text(root)
    assert report["model"]["licence"] == "apache-2.0"
    assert f"{report['perplexity']['tokens.npy']['sliced']:.2f}" in said
    assert "window 16" in said and "same first choice" in said and "1 to 15" in said
    assert "logits moved by" in said and "FLOPs per token" in said
    assert "under the licence `apache-2.0`" in said


def test_the_recipe_in_the_card_is_the_whole_recipe(root: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text(root), re.MULTILINE | re.DOTALL)
    assert parse_recipe(block) == load_recipe(root / "made/recipe.yaml")
    assert parse_recipe(block) != load_recipe(root / "made/recipe.yaml", ["seed=1"])


def test_the_code_in_the_card_loads_the_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", text(root), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(root / "made")
    names: dict[str, object] = {}
    exec(block, names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"


def test_a_checkpoint_of_our_own_says_that_it_needs_the_package(root: Path) -> None:
    report = json.loads((root / "made/report.json").read_text())
    assert "import invariance" not in card(report)
    report["model"] |= {"stock": False, "why_not_stock": "shortcuts"}
    assert "import invariance  # registers" in card(report) and "shortcuts" in card(report)


def test_a_licence_that_is_not_stated_is_not_made_up(root: Path) -> None:
    report = json.loads((root / "made/report.json").read_text())
    report["model"]["licence"] = licence("bare")
    assert report["model"]["licence"] is None
    assert "no licence is stated" in card(report) and "license:" not in card(report)


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "[a](javascript:b)", "**a** | `b` $c$ ~~d~~", "a\n# b"]
)
def test_whatever_a_name_holds_is_shown_as_text(root: Path, name: str) -> None:
    report = json.loads((root / "made/report.json").read_text())
    report["model"] |= {"name": name, "licence": f"mit ` {name}", "stock": False}
    report["model"]["why_not_stock"] = name
    report["perplexity"] = {name: next(iter(report["perplexity"].values()))}
    found = MarkdownIt("commonmark").enable("table").parse(card(report).split("---\n", 2)[2])
    inline = [t for token in found for t in (token, *(token.children or ()))]
    kinds = {t.type for t in inline}
    assert not kinds & {"html_block", "html_inline", "link_open", "strong_open", "em_open"}
    shown = [t.content for t in inline if t.type in ("text", "code_inline")]
    flat = "".join(shown)
    assert flat.count(" ".join(name.split())) >= 4
    heads = [t.content for n, t in enumerate(found) if n and found[n - 1].type == "heading_open"]
    assert len(heads) == 7 and heads[-1] == "Licence"


def test_a_recipe_cannot_leave_its_block_of_code(root: Path) -> None:
    report = json.loads((root / "made/report.json").read_text())
    report["recipe"] = {"model": "a\n```\n<script>\n````\n"}
    found = MarkdownIt("commonmark").parse(card(report))
    assert [t.info for t in found if t.type == "fence"] == ["python", "yaml"]
    assert not [t for t in found if t.type == "html_block"]


def test_a_sliced_model_hands_its_licence_on(root: Path) -> None:
    assert licence("made/model") == "apache-2.0"
    assert licence("packaged:smollm2-135m-instruct") == "apache-2.0"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("packaged:smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("owner/name", "owner/name"),
        ("dense", None),
        ("weights.gguf", None),
        ("./owner/name", None),
    ],
)
def test_the_base_model_is_a_hub_id_or_nothing(root: Path, name: str, found: str | None) -> None:
    assert origin(name) == found


def test_the_card_tells_the_base_model_that_was_known_when_it_was_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(root / "sub/tiny")
    (root / "sub.yaml").write_text(RECIPE.replace("model: dense", "model: sub/tiny"))
    assert invoke("run", "sub.yaml", "--output", "sub-made")[0] == 0
    report = json.loads((root / "sub-made/report.json").read_text())
    monkeypatch.chdir(root / "sub")  # from where sub/tiny looks like a hub id
    assert report["model"]["origin"] is None and "base_model" not in card(report)
    report["model"]["origin"] = "owner/name"
    assert "base_model: owner/name" in card(report)


def test_the_folder_says_where_to_read_on(root: Path) -> None:
    said = (root / "made/README.md").read_text()
    assert "(model/README.md)" in said
    files = {path.name for path in (root / "made").iterdir()} - {"README.md", "manifest.json"}
    assert {name.rstrip("/") for name in re.findall(r"^\| `(.*?)`", said, re.MULTILINE)} == files
