"""Checkpoints written piece by piece: what transformers loads, whole or not at all, and taken up where a run died."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from declared import FAMILIES
from folders import model_of, tokenizer
from safetensors import safe_open
from tiny import tiny
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from invariance.core.errors import InputError
from invariance.io import sink as sinks
from invariance.io.sink import Folder, Memory, open_folder
from invariance.io.source import Source, live, open_source

INDEX = "model.safetensors.index.json"


def steps(source: Source) -> dict[str, list[str]]:
    """Names of tensors, block by block; what is outside the blocks is the last step."""
    made: dict[str, list[str]] = {}
    for name in source.names:
        found = name.split("layers.")
        made.setdefault(f"block {found[1].split('.')[0]}" if len(found) > 1 else "ends", []).append(
            name
        )
    return dict(sorted(made.items()))


def write(sink: Folder | Memory, source: Source, only: Sequence[str] | None = None) -> None:
    for step, names in steps(source).items():
        if step not in sink.finished and (only is None or step in only):
            sink.write(source.read(names))
            sink.done(step)


def same(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    one, two = dict(model.named_parameters()), dict(other.named_parameters())
    return one.keys() == two.keys() and all(
        torch.equal(p, two[n]) and p.dtype == two[n].dtype for n, p in one.items()
    )


@pytest.fixture(params=[5 * 10**9, 10_000], ids=["one file", "shards"])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sinks, "LIMIT", request.param)
    monkeypatch.setattr(sinks, "SMALL", request.param // 20)
    return int(request.param)


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_what_is_written_in_pieces_loads_as_the_model(
    family: str, limit: int, tmp_path: Path
) -> None:
    if family == "mixtral":
        shape = {
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "vocab_size": 40,
        }
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **heads))
    else:
        model = tiny(family, tie_word_embeddings=True, vocab_size=300)
    model.bfloat16().eval()
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.3
    model.get_output_embeddings().float()  # kinds of numbers that lie at multiples of 2 and of 4
    source = live(model)
    sink = open_folder(tmp_path / "out")
    write(sink, source)
    assert not (tmp_path / "out").exists()
    sink.finish(source.config, model.generation_config, tokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (limit < 10**9) == (tmp_path / "out" / INDEX).is_file()
    assert {f.suffix for f in (tmp_path / "out").iterdir()} <= {".json", ".safetensors"}
    for file in files:
        with safe_open(file, "pt") as found:
            assert found.metadata() == {"format": "pt"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=None)
    assert all(
        torch.equal(p, loaded.get_parameter(n).to(p.dtype)) for n, p in model.named_parameters()
    )
    assert type(loaded) is type(model) and loaded.config.architectures == [type(model).__name__]
    assert loaded.generation_config.temperature == 0.3
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tokenizer())
    assert open_source(str(tmp_path / "out")).digest() == source.digest()
    kept = Memory()
    write(kept, source)
    kept.finish(source.config, model.generation_config)
    assert kept.model is not None and same(kept.model, model) and not kept.model.training


def test_blocks_of_a_size_keep_their_files_and_small_ones_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "LIMIT", 50_000)
    monkeypatch.setattr(sinks, "SMALL", 4_000)
    monkeypatch.setattr(sinks, "join", joined := Joined())
    source = live(model_of("llama", num_hidden_layers=6))
    sink = open_folder(tmp_path / "out")
    for names in steps(source).values():
        sink.write(source.read(names[:2]))
        sink.write(source.read(names[2:]))
    sink.finish(source.config)
    files = [f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")]
    assert max(files) <= 50_000 + 2_000 and joined.calls < 8
    assert open_source(str(tmp_path / "out")).digest() == source.digest()


class Joined:
    calls = 0

    def __call__(self, parts: Sequence[Path], path: Path) -> None:
        from invariance.io.join import join

        Joined.calls += 1
        join(parts, path)


# Runs that die


def work(model: Path, out: Path, at: str) -> None:
    """Blocks in order, with a state that goes from one to the next; dies where it is told to."""
    source, sink = open_source(str(model)), open_folder(out, key="work")
    n = len(sink.finished)
    (out.parent / "began").write_text(str(n))
    state = torch.load(sink.scratch / f"{n}.pt") if n else torch.zeros(4)
    for i, names in list(enumerate(steps(source).values()))[n:]:
        state = state * 1.5 + i
        sink.write({name: t + state.sum() for name, t in source.read(names).items()})
        if at == f"write {i}":
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save(state, sink.scratch / f"{i + 1}.pt")
        sink.done(f"{i}", [sink.scratch / f"{i + 1}.pt"])
        if at == f"done {i}":
            os.kill(os.getpid(), signal.SIGKILL)
    sink.finish(source.config)


def ran(model: Path, out: Path, at: str = "") -> int | None:
    """The exit status of a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(model, out, at))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize(
    ("deaths", "began"),
    [(["write 0"], 0), (["done 1"], 2), (["write 2", "done 2"], 3), (["done 3"], 4)],
)
def test_a_killed_run_goes_on_with_the_same_bits(
    deaths: list[str], began: int, tmp_path: Path
) -> None:
    model_of("llama", num_hidden_layers=3).save_pretrained(tmp_path / "m")
    assert ran(tmp_path / "m", tmp_path / "whole") == 0
    for at in deaths:
        assert ran(tmp_path / "m", tmp_path / "out", at) == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    assert ran(tmp_path / "m", tmp_path / "out") == 0
    assert (tmp_path / "began").read_text() == str(began)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def half(tmp_path: Path, key: str = "work") -> Source:
    source = live(model_of("llama", num_hidden_layers=3))
    sink = open_folder(tmp_path / "out", key)
    for step in ("block 0", "block 1"):
        sink.write(source.read(steps(source)[step]))
        state = sink.scratch / step
        state.write_text(step)
        sink.done(step, [state])
    sink.lock.release()
    return source


@pytest.mark.parametrize(
    ("damage", "stands"),
    [
        ("part-00002.safetensors", 1),
        ("part-00001.safetensors", 0),
        ("scratch/block 1", 1),
        ("scratch/block 0", 2),  # which the step behind it needs no more
        ("journal.jsonl", 1),
        ("key", 0),
        ("", 2),
    ],
)
def test_what_is_not_as_it_was_written_is_done_again(
    damage: str, stands: int, tmp_path: Path
) -> None:
    source = half(tmp_path)
    if damage and damage != "key":
        path = tmp_path / ".out.partial" / damage
        path.write_bytes(path.read_bytes()[:-3])
    sink = open_folder(tmp_path / "out", "other" if damage == "key" else "work")
    assert sink.finished == ("block 0", "block 1")[:stands]
    assert len(list(sink.place.glob("part-*"))) == stands
    write(sink, source)
    sink.finish(source.config)
    assert open_source(str(tmp_path / "out")).digest() == source.digest()


# What is refused


def test_two_writers_of_one_folder_are_refused(tmp_path: Path) -> None:
    first = open_folder(tmp_path / "out")
    with pytest.raises(InputError, match="another process is writing it"):
        open_folder(tmp_path / "out")
    first.lock.release()
    open_folder(tmp_path / "out")


def test_what_is_there_already_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sales.xlsx").touch()
    with pytest.raises(InputError, match="is there already"):
        open_folder(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    source = live(model_of("opt"))
    sink = open_folder(tmp_path / "empty")
    write(sink, source)
    sink.finish(source.config)
    assert (tmp_path / "empty" / "config.json").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written here"):
        open_folder(tmp_path / "file" / "out")


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_config_that_describes_something_else_is_refused(where: str, tmp_path: Path) -> None:
    source = live(model_of("llama"))
    norm = "model.norm.weight"

    def sink(change: dict[str, Tensor | None]) -> Folder | Memory:
        made = (
            Memory()
            if where == "memory"
            else open_folder(tmp_path / str(len(os.listdir(tmp_path))))
        )
        whole = source.read(source.names) | change
        made.write({n: t for n, t in whole.items() if t is not None})
        return made

    for change, says in (
        ({norm: None}, f"lacks {norm}"),
        ({norm: torch.ones(3)}, r"\(3,\) for \(32,\)"),
        ({"more": torch.ones(3)}, "no place for: more"),
    ):
        with pytest.raises(InputError, match=says):
            sink(change).finish(source.config)


def test_a_tensor_written_twice_is_an_error(tmp_path: Path) -> None:
    source = live(model_of("llama"))
    sink = open_folder(tmp_path / "out")
    write(sink, source)
    sink.write(source.read(["model.norm.weight"]))
    with pytest.raises(ValueError, match="written twice"):
        sink.finish(source.config)


def test_the_index_counts_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "LIMIT", 20_000)
    source = live(model_of("llama"))
    sink = open_folder(tmp_path / "out")
    write(sink, source)
    sink.finish(source.config)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == source.nbytes
    assert index["weight_map"].keys() == source.names.keys()
