"""Benchmarks: what is counted is what is computed, models take turns, and the roof is where it should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from folders import invoke, model_of, save_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from invariance.io.checkpoint import layout_of_config
from invariance.measure import bench
from invariance.measure.bench import Machine, Spread, Work, Workload, interleaved
from invariance.measure.costs import counted
from invariance.model.tiny import tiny
from invariance.report.bench_report import grids

FAMILIES = ("llama", "opt", "phi")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("bench")
    save_model(root / "dense")
    save_model(root / "sliced", intermediate_size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.chdir(root)
        yield root


@pytest.mark.parametrize("family", FAMILIES)
def test_the_flops_to_the_first_token_are_those_that_torch_counts(family: str) -> None:
    model, workload = model_of(family), Workload(batch=3, prompt=20, new=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ids = torch.ones(workload.batch, workload.prompt, dtype=torch.long)
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    found = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in found.items() if str(op) in ("aten.mm", "aten.addmm"))
    costs = counted(model, family)
    assert workload.first_token(costs, 4).flops == products
    assert (
        workload.batch * workload.prompt * costs.flops > products
    )  # the head sees the last token only


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_holds_the_bytes_that_are_counted(family: str) -> None:
    model, cache = model_of(family), DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.ones(2, 9, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == 2 * 9 * counted(model, family).kv_entries


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_counted_is_what_a_layout_says(family: str) -> None:
    costs, layout = counted(model_of(family), family), layout_of_config(model_of(family).config)
    assert costs.flops == layout.flops({}) and costs.kv_entries == layout.kv_entries({})
    assert costs.head_flops == layout.head_flops


def test_a_step_reads_every_matrix_and_the_cache_so_far() -> None:
    costs = counted(model_of("llama"), "llama")
    one, many = (Workload(b, 100, 20).step(costs, 2) for b in (1, 8))
    matrices = costs.flops  # two per entry, of two bytes each
    assert one.bytes == matrices + 2 * 110 * costs.kv_entries
    assert many.bytes == matrices + 8 * (one.bytes - matrices) and many.flops == 8 * one.flops


def test_the_roof_is_the_slower_of_memory_and_arithmetic() -> None:
    machine = Machine("test", bytes_per_second=10.0, flops_per_second=1000.0)
    assert machine.ridge == 100
    assert Work(flops=50, bytes=10).bound(machine) == "memory"
    assert Work(flops=50, bytes=10).seconds(machine) == 1.0
    assert Work(flops=5000, bytes=10).bound(machine) == "compute"
    assert Work(flops=5000, bytes=10).seconds(machine) == 5.0


def test_models_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    models = {"a": model_of("llama"), "b": model_of("llama")}
    names = {id(m): n for n, m in models.items()}

    def work(model: object) -> int:
        calls.append(names[id(model)])
        return len(calls)

    found = interleaved(models, work, repeats=3)
    assert calls == ["a", "b"] * 4
    assert found == {"a": [3, 5, 7], "b": [4, 6, 8]}


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(median=3.0, low=2.0, high=4.0)


@pytest.fixture(scope="module")
def document(root: Path) -> dict:
    flags = (
        "--batch",
        1,
        "--batch",
        2,
        "--prompt",
        8,
        "--new",
        3,
        "--repeats",
        2,
        "--output",
        "out",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.COPIED, "cpu", 2**20)
        patch.setitem(bench.SQUARE, "cpu", 64)
        status, out, err = invoke("bench", "dense", "sliced", *flags, "--device", "cpu", "--json")
    assert status == 0, err
    return json.loads(out)


def test_the_command_says_what_each_model_costs(root: Path, document: dict) -> None:
    dense, sliced = document["models"]
    files = sum(f.stat().st_size for f in (root / "dense").glob("*.safetensors"))
    assert dense["file_bytes"] == files > sliced["file_bytes"]
    assert dense["parameters"] == sum(p.numel() for p in model_of("llama").parameters())
    assert dense["flops_per_token"] > sliced["flops_per_token"]
    assert (
        dense["kv_bytes_per_token"] == 4 * 2 * 2 * 2 * 8
    )  # bytes, layers, keys and values, heads, dims
    for each in (dense, sliced):
        assert each["peak_memory_bytes"] > each["file_bytes"]


def test_the_command_times_every_setting_of_every_model(document: dict) -> None:
    rows = document["timings"]
    assert [(r["name"], r["batch"]) for r in rows] == [
        ("dense", 1),
        ("sliced", 1),
        ("dense", 2),
        ("sliced", 2),
    ]
    for row in rows:
        for phase in ("first_token", "decode"):
            part = row[phase]
            for spread in (part["seconds"], part["tokens_per_second"], part["speed_up"]):
                assert 0 < spread["low"] <= spread["median"] <= spread["high"]
            assert part["bound"] in ("memory", "compute")
            assert (part["promised_speed_up"] > 1) == (row["name"] == "sliced")
        if row["name"] == "dense":
            assert row["decode"]["speed_up"] == {"median": 1, "low": 1, "high": 1}


def test_the_command_writes_a_page_that_loads_nothing(root: Path, document: dict) -> None:
    assert json.loads((root / "out/bench.json").read_text()) == document
    html = (root / "out/bench.html").read_text()
    tags: list[tuple[str, dict]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            tags.append((tag, dict(attrs)))

    Reader().feed(html)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
    assert sum(tag == "svg" for tag, _ in tags) == 2 and sum(tag == "table" for tag, _ in tags) == 3
    assert "dense, batch 2, prompt 8" in html


def test_an_earlier_benchmark_is_replaced_when_asked_and_not_else(
    root: Path, document: dict
) -> None:
    shutil.copytree(root / "out", root / "earlier")
    flags = ("--batch", 1, "--prompt", 4, "--new", 2, "--repeats", 1, "--output", "earlier")
    status, out, err = invoke("bench", "dense", *flags)
    assert status == 2 and out == "" and "say --overwrite" in " ".join(err.split())
    assert json.loads((root / "earlier/bench.json").read_text()) == document
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.COPIED, "cpu", 2**20)
        patch.setitem(bench.SQUARE, "cpu", 64)
        assert invoke("bench", "dense", *flags, "--overwrite")[0] == 0
    assert len(json.loads((root / "earlier/bench.json").read_text())["models"]) == 1


def test_weights_of_few_bits_are_said_to_run_as_full_numbers(document: dict) -> None:
    assert [each["rounded"] for each in document["models"]] == [False, False]
    assert "few bits" not in grids(document)[0].caption
    few = document | {"models": [document["models"][0], document["models"][1] | {"rounded": True}]}
    told = grids(few)[0]
    assert (
        r"| sliced \* |" in told.markdown()
        and "| dense |" in told.markdown()
        and "few bits" in told.caption
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("dense", "sliced", "sliced"), "sliced: a model stands there twice"),
        (("dense", "--dtype", "int8"), "not a dtype that is known"),
        (("mamba",), "a model of type 'mamba' does not run on a token with a growing cache"),
        (("gone/gone/gone",), "there is no such file or folder"),
        (("opt", "--prompt", "400"), "the model has 320 positions"),
        (("dense", "--output", "file"), "Name a folder"),
        (("dense", "--output", "sliced", "--overwrite"), "no manifest.json says"),
    ],
)
def test_what_cannot_be_is_refused(root: Path, arguments: tuple[str, ...], told: str) -> None:
    if not (root / "opt").exists():
        save_model(root / "opt", "opt")
        tiny("mamba").model.save_pretrained(root / "mamba")
        (root / "file").write_text("")
    status, out, err = invoke("bench", *arguments)
    assert status == 2 and out == "" and told in " ".join(err.split())
