"""Every recipe that ships, end to end on a tiny model: report, checkpoint, generation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import VOCABULARY, overrides, save_model, save_tokens, stored_numbers
from transformers import AutoModelForCausalLM, PreTrainedModel

from invariance import load
from invariance.model.verify import logits, relative_error, tolerance
from invariance.run import run as runs

RECIPES = Path(__file__).parents[2] / "recipes"
ELSEWHERE = {"moe"}  # of another model than the tiny one here: tests/compress/test_experts.py
NAMES = sorted({p.stem for p in RECIPES.glob("*.yaml")} - ELSEWHERE)
STOCK = {
    "demo",
    "dense-target",
    "global-basis",
    "hadamard",
    "mlp",
    "random",
}  # one basis, uniform widths
STOCK |= {"recover-lora", "recover-distill", "int4", "slice-int4", "gptq-int4", "sparsegpt"}
STOCK |= {
    "best-stock",
    "depth-and-width",
    "kv-cache",
    "shortgpt",
    "replace-me",
    "obs",
    "output-aware",
    "reader-weighted",
    "learned-rotation",
}
OWN = {
    "kv-cache-per-head",
    "slicegpt",
    "combined",
    "heads",
    "nonuniform",
    "best",
    "best-mixture",
    "flap",
    "modegpt",
    "svd-llm",
    "family",
    "hadamard-int4",
    "obd-llm",
    "quip-int4",
}
UNCUT = {"hadamard", "random", "int4", "hadamard-int4"}
UNCUT |= {"gptq-int4", "quip-int4", "sparsegpt"}
NARROWER: dict[str, dict[str, Any]] = {
    "combined": {"steps.0.select.uniform.width": 27, "steps.2.select.uniform.width": 6},
    "heads": {"steps.0.select.uniform.width": 6},
    "learned-rotation": {"steps.0.rotate.learned_rotation.steps": 2},
    "kv-cache-per-head": {"steps.0.select.uniform.width": 4, "steps.1.select.uniform.width": 4},
    "flap": {"steps.0.widths.multiple_of": 8},
    "modegpt": {f"steps.{n}.widths.multiple_of": k for n, k in enumerate((8, 2, 2))},
    "nonuniform": {"steps.0.widths.multiple_of": 2},
    "depth-and-width": {"steps.0.select.shortgpt.blocks": 1, "budget.parameters": 0.5},
    "best-mixture": {
        "steps.0.widths.multiple_of": 8,
        "steps.1.widths.multiple_of": 2,
        "vocabulary.common": 12,
        "vocabulary.rank": 8,
    },
    "best": {"steps.0.widths.multiple_of": 8, "steps.1.widths.multiple_of": 2},
    "family": {"recover.held_out": 2, "recover.tokens": 320, "recover.batch": 2},
    "recover-distill": {"recover.held_out": 2, "recover.tokens": 320, "recover.batch": 2},
    "recover-lora": {"recover.held_out": 2, "recover.tokens": 320, "recover.batch": 2},
}
IDS = torch.arange(1, 25)[None] % VOCABULARY
DEPTH = 4

pytestmark = pytest.mark.xdist_group("recipes")  # which are all run once, for every test here

FRESH = """
import json, sys
if sys.argv[1] == "plain":
    sys.modules["invariance"] = None  # any import of it raises ImportError
else:
    import invariance
import numpy as np, torch
from transformers import AutoModelForCausalLM, PreTrainedModel
torch.set_num_threads(1)
ids = torch.arange(1, 25)[None] % {vocabulary}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder + "/model").eval()
    with torch.no_grad():
        np.save(folder + "/fresh.npy", model(input_ids=ids).logits.numpy())
    kept = [model.generate(ids[:, :5], max_new_tokens=6, do_sample=False, use_cache=c).tolist() for c in (True, False)]
    json.dump(kept, open(folder + "/generated.json", "w"))
"""


@dataclass(frozen=True)
class Made:
    """What a recipe gave: its report, and the checkpoint as this process loads it."""

    report: dict[str, Any]
    model: PreTrainedModel


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Made]]:
    """What every recipe gives, by name; the folders lie beside each other at ``report["output"]``."""
    root = tmp_path_factory.mktemp("recipes")
    model = save_model(root / "tiny")
    data = save_tokens(root / "tokens.npy")
    results: dict[str, Made] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        for name in NAMES:
            text = (RECIPES / f"{name}.yaml").read_text()
            values: dict[str, Any] = {"model": model}
            for key in ("calibrate", "evaluate.0.perplexity"):
                if key.split(".")[0] + ":" in text:
                    values |= {f"{key}.data": data, f"{key}.sequences": 12, f"{key}.tokens": 16}
            if "calibrate:" in text:
                values["calibrate.dtype"] = "float32"
            asked = overrides(values | NARROWER.get(name, {}))
            report = runs.run(RECIPES / f"{name}.yaml", root / name, asked)
            results[name] = Made(report, load(str(root / name / "model")))
        yield results


@pytest.fixture(scope="session")
def fresh(made: dict[str, Made]) -> dict[str, Path]:
    """The folders, after two new processes have loaded what lies there: one of them cannot import us."""
    folders = {name: Path(found.report["output"]) for name, found in made.items()}
    stock = {name for name, found in made.items() if found.report["model"]["stock"]}
    for how, names in (("plain", stock), ("ours", set(NAMES) - stock)):
        code = FRESH.format(vocabulary=VOCABULARY)
        chosen = [str(folders[n]) for n in sorted(names)]
        done = subprocess.run(
            [sys.executable, "-c", code, how, *chosen], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return folders


@pytest.mark.parametrize("name", NAMES)
def test_the_report_says_what_design_promises(made: dict[str, Made], name: str) -> None:
    folder = Path(made[name].report["output"])
    report = json.loads((folder / "report.json").read_text())
    for side in ("dense", "sliced"):
        parts = report["parameters"][side]
        assert set(parts) == {"total", "embedding", "blocks", "shortcuts", "head"}
        assert parts["total"] == sum(n for part, n in parts.items() if part != "total")
        assert report["flops_per_token"][side] > 0 and report["kv_bytes_per_token"][side] > 0
    exactness = report["exactness"]
    assert set(exactness) >= {"relative_error", "tolerance", "negative_control", "passed"}
    assert exactness["passed"] and exactness["relative_error"] <= exactness["tolerance"]
    assert exactness["negative_control"] > 1000 * exactness["tolerance"]
    assert {"x.0.0", "x.2.0", "mlp.1", "vo.0", "qk.1"} <= set(report["widths"])
    (measured,) = report["perplexity"].values()
    assert {"dense", "sliced", "recovered"} <= set(measured) and measured["dense"] > 1
    assert all(s >= 0 for s in report["seconds"].values()) and {"slice", "verify"} & set(
        report["seconds"]
    )
    assert report["peak_memory_bytes"] > 2**20
    assert {"python", "torch", "transformers"} <= set(report["versions"])
    assert report["recipe"]["steps"] and report["recipe"]["model"] == report["model"]["name"]


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_holds_a_page_that_loads_nothing_and_the_recipe(
    made: dict[str, Made], name: str
) -> None:
    folder = Path(made[name].report["output"])
    page = (folder / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "certif" in page.lower()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\((?!#)""", page)
    from invariance.recipe.recipe import load_recipe

    assert load_recipe(folder / "recipe.yaml").to_dict() == made[name].report["recipe"]
    assert (folder / "model" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_in_the_report_are_those_in_the_files(made: dict[str, Made], name: str) -> None:
    report = made[name].report
    folder = Path(report["output"])
    assert report["parameters"]["sliced"]["total"] == stored_numbers(folder / "model")
    assert report["parameters"]["dense"]["total"] == stored_numbers(folder.parent / "tiny")


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoint_loads_in_a_new_process_with_the_same_logits(
    made: dict[str, Made], fresh: dict[str, Path], name: str
) -> None:
    loaded = torch.from_numpy(np.load(fresh[name] / "fresh.npy"))
    here = logits(made[name].model, IDS)
    assert loaded.shape == here.shape
    assert relative_error(here, loaded) <= tolerance(torch.float32, DEPTH)


def test_one_basis_and_uniform_widths_make_a_stock_checkpoint(made: dict[str, Made]) -> None:
    why = {name: found.report["model"]["why_not_stock"] for name, found in made.items()}
    assert {name for name in STOCK if why[name]} == set()
    assert {name for name in OWN if not why[name]} == set()


@pytest.mark.parametrize("name", NAMES)
def test_generation_with_and_without_a_cache_agrees(fresh: dict[str, Path], name: str) -> None:
    cached, uncached = json.loads((fresh[name] / "generated.json").read_text())
    assert cached == uncached and len(cached[0]) == 11


@pytest.mark.parametrize("name", ["hadamard", "random"])
def test_a_recipe_that_only_rotates_leaves_the_logits(made: dict[str, Made], name: str) -> None:
    dense = AutoModelForCausalLM.from_pretrained(
        Path(made[name].report["output"]).parent / "tiny"
    ).eval()
    error = relative_error(logits(dense, IDS), logits(made[name].model, IDS))
    assert 0 < error <= tolerance(torch.float32, DEPTH)


@pytest.mark.parametrize("name", sorted(set(NAMES) - UNCUT))
def test_a_recipe_that_cuts_moves_the_logits_and_stores_or_computes_less(
    made: dict[str, Made], name: str
) -> None:
    report = made[name].report
    dense = AutoModelForCausalLM.from_pretrained(Path(report["output"]).parent / "tiny").eval()
    assert relative_error(logits(dense, IDS), logits(made[name].model, IDS)) > 1e-3
    assert any(k < report["dims"][space] for space, k in report["widths"].items())
    assert report["parameters"]["sliced"]["blocks"] < report["parameters"]["dense"]["blocks"]


def test_the_processes_that_load_stock_checkpoints_cannot_import_the_package() -> None:
    code = 'import sys; sys.modules["invariance"] = None; import invariance'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr
