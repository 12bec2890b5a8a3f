"""Weights from disk a few at a time: the same bits as from_pretrained, bounded memory, every broken checkpoint refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from declared import FAMILIES
from folders import model_of
from safetensors.torch import load_file, save_file
from tiny import tiny
from torch.nn.utils import prune
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from invariance.compress.rounding.apply import quantized
from invariance.core.errors import InputError
from invariance.io.checkpoint import layout_of_config
from invariance.io.models import load_config, load_model
from invariance.io.source import Source, live, open_source
from invariance.recipe.quantize import Quantize
from invariance.run.compress import compress

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))


def saved(model: PreTrainedModel, folder: Path, shard: str = "10kB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def filled(source: Source) -> PreTrainedModel:
    """The skeleton with everything that its source has; tied as it is."""
    model = source.skeleton
    model.load_state_dict(source.read(source.names), strict=False, assign=True)
    model.tie_weights()
    return model


def refused(model: object) -> str:
    with pytest.raises(InputError) as caught:
        open_source(str(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_family_reads_as_from_pretrained_reads_it_bit_for_bit(tmp_path: Path) -> None:
    for n, (family, dtype, tied) in enumerate(
        (f, d, t) for f in FAMILIES for d in (torch.float32, torch.bfloat16) for t in (True, False)
    ):
        model = tiny(family, tie_word_embeddings=tied, vocab_size=300).to(dtype)
        folder = saved(model, tmp_path / str(n))
        assert (folder / INDEX).is_file()
        source, loaded = open_source(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
        own = dict(loaded.named_parameters())
        assert list(source.names) == list(own) == [n for n, _ in source.skeleton.named_parameters()]
        assert all(p.is_meta for p in source.skeleton.parameters())
        assert not source.skeleton.training
        read = source.read(reversed(source.names))
        for name, parameter in own.items():
            assert source.names[name] == (tuple(parameter.shape), dtype)
            assert torch.equal(read[name], parameter) and read[name].dtype == dtype
        buffers = dict(load_model(str(folder)).named_buffers())
        assert buffers.keys() == dict(source.skeleton.named_buffers()).keys()
        assert all(torch.equal(source.skeleton.get_buffer(n), b) for n, b in buffers.items())
        assert source.stored == dtype and source.nbytes == sum(p.nbytes for p in own.values())
        rows = torch.tensor([3, 299, 3])
        table = next(iter(own))
        assert torch.equal(source.rows(table, rows), own[table][rows])
        assert source.config.tie_word_embeddings == tied
        ids = torch.arange(9)[None]
        with torch.no_grad():
            assert torch.equal(filled(source).to(dtype)(ids).logits, loaded.eval()(ids).logits)


def test_experts_are_stacked_as_transformers_stacks_them(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **shape, **heads))
    folder = saved(model, tmp_path / "m")
    keys = json.loads((folder / INDEX).read_text())["weight_map"]
    assert any("experts.2" in key for key in keys)  # apart in the files, together in the model
    source, loaded = open_source(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    read = source.read(source.names)
    assert [*read] == [n for n, _ in loaded.named_parameters()]
    assert all(torch.equal(read[n], p) for n, p in loaded.named_parameters())
    block = [n for n in source.names if ".layers.1." in n]
    assert source.read(block).keys() == set(block)


def test_a_digest_is_of_the_numbers_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama")
    one = open_source(str(saved(model, tmp_path / "one")))
    other = open_source(str(saved(model, tmp_path / "other", shard="1GB")))
    known = one.digest()
    assert known == other.digest() == live(model).digest()
    monkeypatch.setattr("invariance.io.source._digest", lambda source: 1 / 0)
    assert open_source(str(tmp_path / "one")).digest() == known  # by size and time
    monkeypatch.undo()
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))
    with tampered(tmp_path / "other") as tensors:
        tensors[NORM][3] += 1e-3
    assert open_source(str(tmp_path / "other")).digest() != known
    assert live(model.bfloat16()).digest() != known


class tampered:
    """The tensors of a checkpoint in one file, to be changed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.safetensors"

    def __enter__(self) -> dict[str, torch.Tensor]:
        self.tensors = load_file(self.path)
        return self.tensors

    def __exit__(self, *failed: object) -> None:
        save_file(self.tensors, self.path, metadata={"format": "pt"})


def test_a_live_model_is_a_source_of_copies(tmp_path: Path) -> None:
    model = model_of("gemma3_text", tie_word_embeddings=True)
    source = live(model)
    read = source.read(source.names)
    for name, parameter in model.named_parameters():
        assert torch.equal(read[name], parameter) and read[name].data_ptr() != parameter.data_ptr()
    assert (
        all(p.is_meta for p in source.skeleton.parameters())
        and not next(model.parameters()).is_meta
    )
    assert source.skeleton.lm_head.weight is source.skeleton.model.embed_tokens.weight
    assert torch.equal(
        source.skeleton.model.embed_tokens.embed_scale, model.model.embed_tokens.embed_scale
    )
    assert source.rows("model.embed_tokens.weight", torch.tensor([5])).shape == (1, 32)


# Tied or not: the weights decide


def claim(folder: Path, tied: bool) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))


@pytest.mark.parametrize("equal", [False, True])
def test_a_head_in_the_files_that_is_no_copy_of_the_table_is_not_tied(
    equal: bool, tmp_path: Path
) -> None:
    model = model_of("llama", tie_word_embeddings=False)
    if equal:
        model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    folder = saved(model, tmp_path / "m", shard="1GB")
    claim(folder, True)
    loaded, source = load_model(str(folder)), open_source(str(folder))
    one = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert one == equal
    for config in (load_config(str(folder)), loaded.config, source.config, source.skeleton.config):
        assert config.tie_word_embeddings == equal
    assert list(source.names) == [n for n, _ in loaded.named_parameters()]
    assert source.nbytes == sum(p.nbytes for p in loaded.parameters())
    assert all(torch.equal(source.read([n])[n], p) for n, p in loaded.named_parameters())
    layout = layout_of_config(load_config(str(folder)))
    assert layout.tied == equal and layout.parameters({}).total == loaded.num_parameters()


def test_a_model_in_memory_is_tied_as_its_weights_are(tmp_path: Path) -> None:
    folder = saved(model_of("llama", tie_word_embeddings=False), tmp_path / "m", shard="1GB")
    claim(folder, True)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.config.tie_word_embeddings  # which is not so
    step = {"spaces": "residual", "rotate": "hadamard"}
    made = compress(model, {"model": "m", "steps": [step]})
    assert made.num_parameters() == model.num_parameters() and not made.config.tie_word_embeddings
    adapted = peft.get_peft_model(model_of("llama"), peft.LoraConfig())
    with pytest.raises(InputError, match="merge_and_unload"):
        compress(adapted, {"model": "m", "steps": [step]})


def test_a_tied_model_whose_files_hold_the_head_alone_has_a_table(tmp_path: Path) -> None:
    folder = saved(model_of("llama", tie_word_embeddings=True), tmp_path / "m", shard="1GB")
    with tampered(folder) as tensors:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    source = open_source(str(folder))
    read = source.read(["model.embed_tokens.weight"])
    assert torch.equal(
        read["model.embed_tokens.weight"], load_model(str(folder)).model.embed_tokens.weight
    )
    assert "lm_head.weight" not in source.names


def test_a_head_that_is_nowhere_is_missing_whatever_else_is_there(tmp_path: Path) -> None:
    folder = saved(model_of("llama", tie_word_embeddings=True), tmp_path / "m", shard="1GB")
    claim(folder, False)
    assert "lacks lm_head.weight" in refused(folder)


def test_weights_that_torchao_rounded_are_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    asked = Quantize.model_validate({"bits": 4, "group": 8})
    quantized(model_of("llama"), asked).save_pretrained(tmp_path / "few")
    source, loaded = open_source(str(tmp_path / "few")), load_model(str(tmp_path / "few"))
    assert all(torch.equal(source.read([n])[n], p) for n, p in loaded.named_parameters())
    assert not torch.equal(
        model_of("llama").model.layers[0].mlp.up_proj.weight,
        source.read(["model.layers.0.mlp.up_proj.weight"])["model.layers.0.mlp.up_proj.weight"],
    )


# The hub


def test_a_hub_id_is_read_from_the_snapshot_in_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "hub" / "models--owner--name"
    saved(model_of("llama"), root / "snapshots" / ("0" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    source = open_source("owner/name")
    assert source.digest() == live(model_of("llama")).digest()
    with pytest.raises(InputError, match="hub cannot be reached"):
        open_source("owner/other")
    next((root / "snapshots").glob("*/*-00003-*")).unlink()
    with pytest.raises(InputError, match="its local cache lacks the weights"):
        open_source("owner/name")


# Memory

BLOCK = """
import resource, sys, torch
from invariance.io.source import open_source
source = open_source(sys.argv[1])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
names = [n for n in source.names if ".layers.0." in n]
block = sum(t.nbytes for t in source.read(names).values())
before = peak()
for i in range(source.config.num_hidden_layers):
    source.read([n for n in source.names if f".layers.{i}." in n])
source.rows("model.embed_tokens.weight", torch.arange(0, 4000, 7))
print(block, source.nbytes, peak() - before)
"""


def test_reading_a_block_takes_the_memory_of_a_block(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 6}
    model = tiny("llama", vocab_size=20_000, num_attention_heads=8, **shape)
    folder = saved(model, tmp_path / "m", shard="60MB")
    done = subprocess.run(
        [sys.executable, "-c", BLOCK, str(folder)], capture_output=True, text=True, check=True
    )
    block, whole, grown = map(int, done.stdout.split())
    assert whole > 8 * block
    assert grown < block // 2, f"{grown / 1e6:.0f} MB more than one block of {block / 1e6:.0f} MB"


# What is refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(model_of("llama", tie_word_embeddings=True), tmp_path / "m")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return saved(model_of("llama", tie_word_embeddings=True), tmp_path / "s", shard="1GB")


@pytest.mark.parametrize(
    "name", ["../b.safetensors", "/etc/b.safetensors", "sub/b.safetensors", ".."]
)
def test_an_index_that_names_what_lies_elsewhere_is_refused(folder: Path, name: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    save_file({NORM: torch.ones(32)}, folder.parent / "b.safetensors")
    index["weight_map"][NORM] = name
    (folder / INDEX).write_text(json.dumps(index))
    assert "does not lie in this folder" in refused(folder)
    with pytest.raises(InputError, match="does not lie in this folder"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{", "no weight_map"),
        ("[]", "no weight_map"),
        ('{"weight_map": 3}', "no weight_map"),
        ('{"weight_map": {"a": "none.safetensors"}}', "'none.safetensors', which is not there"),
        ("[" * 100_000, "no weight_map"),
    ],
)
def test_a_broken_index_is_refused(folder: Path, index: str, says: str) -> None:
    (folder / INDEX).write_text(index)
    assert says in refused(folder)


def test_an_index_that_promises_too_much_is_refused(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["extra"] = index["weight_map"][NORM]
    (folder / INDEX).write_text(json.dumps(index))
    assert "does not hold extra" in refused(folder)


@pytest.mark.parametrize("keep", [0, 4, 500, -100])
def test_truncated_shards_are_refused(folder: Path, keep: int) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    assert f"{shard.name}: the weights cannot be read" in refused(folder)


def test_tensors_that_are_missing_too_many_or_of_another_shape_are_refused(single: Path) -> None:
    with tampered(single) as tensors:
        norm = tensors.pop(NORM)
    assert f"lacks {NORM}" in refused(single)
    with tampered(single) as tensors:
        tensors |= {NORM: torch.ones(31)}
    assert f"{NORM} (31,) for (32,)" in refused(single)
    with tampered(single) as tensors:
        tensors |= {NORM: norm, "extra": torch.ones(2)}
    assert "has no place for: extra" in refused(single)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite_are_refused_when_they_are_read(
    single: Path, value: float, dtype: torch.dtype
) -> None:
    with tampered(single) as tensors:
        tensors[NORM] = tensors[NORM].to(dtype)
        tensors[NORM][3] = value
        tensors["model.embed_tokens.weight"][7, 1] = value
    source = open_source(str(single))
    source.read(["model.layers.0.mlp.up_proj.weight"])
    with pytest.raises(InputError, match=f"{NORM} holds NaN or infinite"):
        source.read([NORM])
    source.rows("model.embed_tokens.weight", torch.tensor([6, 8]))
    with pytest.raises(InputError, match=r"embed_tokens\.weight holds NaN"):
        source.rows("model.embed_tokens.weight", torch.tensor([7]))


def test_pickles_quantised_weights_and_adapters_are_refused(single: Path) -> None:
    (single / "adapter_config.json").write_text("{}")
    assert "Merge the adapter into the model first" in refused(single)
    (single / "adapter_config.json").unlink()
    config = json.loads((single / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (single / "config.json").write_text(json.dumps(quantised))
    assert "its weights are quantized" in refused(single)
    (single / "config.json").write_text(json.dumps(config))
    torch.save(load_file(single / "model.safetensors"), single / "pytorch_model.bin")
    (single / "model.safetensors").unlink()
    assert "pytorch_model.bin would have to be unpickled" in refused(single)


def test_models_in_memory_whose_weights_are_not_their_own_are_refused(single: Path) -> None:
    model = model_of("llama")
    for wrapped, says in (
        (peft.get_peft_model(model_of("llama"), peft.LoraConfig()), "merge_and_unload"),
        (torch.compile(model), "_orig_mod"),
        (torch.nn.DataParallel(model), "`model.module`"),
        (torch.nn.Linear(2, 2), "no model of transformers"),
        (live(model).skeleton, "offloaded, or on the meta device"),
    ):
        with pytest.raises(InputError, match=says):
            live(wrapped)
    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    with pytest.raises(InputError, match="prune"):
        live(model)


def test_what_is_damaged_between_opening_and_reading_is_refused(single: Path) -> None:
    source = open_source(str(single))
    (single / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="changed while it was being read"):
        source.read([NORM])
