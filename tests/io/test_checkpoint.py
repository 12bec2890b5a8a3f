"""A model that no stock config holds is one of its family's own class: every option of transformers works on it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from folders import VOCABULARY, model_of
from safetensors.torch import load_file, save_file
from tiny import cut, cuttable, elements, rotations, segments, share
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache
from transformers import models as families

from invariance.core.change import Change
from invariance.core.errors import InputError
from invariance.io.checkpoint import InvarianceConfig, InvarianceForCausalLM, wrap
from invariance.io.export import cast
from invariance.io.models import load_config, load_model
from invariance.io.source import live, open_source
from invariance.model.canonical import canonicalize
from invariance.model.copies import double_copy
from invariance.model.reparametrize import reparametrize
from invariance.model.verify import certify, relative_error, tolerance

FAMILIES = ["llama", "qwen3", "gemma3_text", "opt", "phi"]
CLASSES = {
    "llama": families.llama.LlamaForCausalLM,
    "qwen3": families.qwen3.Qwen3ForCausalLM,
    "gemma3_text": families.gemma3.Gemma3ForCausalLM,
    "opt": families.opt.OPTForCausalLM,
    "phi": families.phi.PhiForCausalLM,
}
IDS = torch.arange(1, 25)[None] % VOCABULARY
WIDTHS = {"residual": (24, 26), "mlp": (40, 43), "vo": (4, 5), "qk": (6, 6)}  # in turn
NEAR = tolerance(torch.float32, 4)


@cache
def dense(family: str, **options: Any) -> PreTrainedModel:
    return model_of(family, **options)


def sliced(family: str, kind: str, tie: str = "untie", **options: Any) -> PreTrainedModel:
    """A model of one's own to change, as ``_sliced`` makes it."""
    return copy.deepcopy(_sliced(family, kind, tie, **options))


@cache
def _sliced(family: str, kind: str, tie: str, **options: Any) -> PreTrainedModel:
    """``rotated``: every point of the stream in a basis of its own, nothing cut. ``cut``: every space that can be is
    narrower, by another number in every layer."""
    model = dense(family, **options)
    twin = double_copy(model)
    layout = canonicalize(twin, fold=True, tie=tie)
    named = [
        n for n, space in layout.spaces.items() if space.kind in WIDTHS and cuttable(layout, n)
    ]
    names = layout.points if kind == "rotated" else named
    changes = rotations(share(elements(layout, names, seed=3), segments(layout, "block")))
    if kind == "cut":
        made: dict[int, Change] = {}
        for name, change in changes.items():
            space, even = layout.spaces[name], int(name.split(".")[1]) % 2
            made.setdefault(id(change), cut(change, WIDTHS[space.kind][even], space))
        changes = {name: made[id(change)] for name, change in changes.items()}
    reparametrize(twin, layout, changes)
    found = wrap(twin, layout, model.config, tie)
    cast(found, torch.float32)
    return found


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["rotated", "cut"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def reloaded(model: PreTrainedModel, folder: Path, **options: Any) -> PreTrainedModel:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS, **options: Any) -> Tensor:
    return model(input_ids=ids, **options).logits


def tokens(model: PreTrainedModel, ids: Tensor, **options: Any) -> list[list[int]]:
    asked = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True} | options
    return model.generate(ids, **asked)[:, ids.shape[1] :].tolist()


def test_it_is_its_family_s_class_with_one_config(family: str, kind: str, tmp_path: Path) -> None:
    model = reloaded(sliced(family, kind), tmp_path)
    assert isinstance(model, CLASSES[family]) and isinstance(model, InvarianceForCausalLM)
    assert isinstance(model.config, type(dense(family).config))
    configs = {id(m.config) for m in model.modules() if "config" in vars(m)}
    assert configs == {id(model.config)}
    assert model.config.hidden_size == model.get_input_embeddings().embedding_dim
    assert model.config.dense().to_dict() | {"head_dim": 8} == {
        k: v
        for k, v in (dense(family).config.to_dict() | {"head_dim": 8}).items()
        if k != "architectures"
    } | {"architectures": None, "tie_word_embeddings": False, "dtype": torch.float32} | {
        k: v for k, v in model.config.dense().to_dict().items() if k in ("dtype", "_name_or_path")
    }
    same = relative_error(logits(dense(family)), logits(model)) <= NEAR
    assert same == (kind == "rotated")
    assert {f.suffix for f in tmp_path.iterdir()} == {".json", ".safetensors"}
    copied = copy.deepcopy(model)
    assert type(copied) is type(model) and torch.equal(logits(copied), logits(model))


# A1: caches


CACHES: dict[str, dict[str, Any]] = {
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "chunks": {"prefill_chunk_size": 3},
    "static, chunks": {"prefill_chunk_size": 3, "cache_implementation": "static"},
}


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("how", CACHES)
def test_all_caches_give_the_tokens_of_a_dynamic_one(
    family: str, kind: str, how: str, padded: bool
) -> None:
    if how == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloading asks for a GPU")
    model, ids = sliced(family, kind), IDS.repeat(2, 1)[:, :9].clone()
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
        ids[1, :4] = 0
    wanted = tokens(model, ids, attention_mask=mask)
    assert tokens(model, ids, attention_mask=mask, **CACHES[how]) == wanted
    if kind == "rotated":
        assert tokens(dense(family), ids, attention_mask=mask) == wanted
    if padded:  # as the same tokens without padding
        assert tokens(model, ids[1:, 4:]) == wanted[1:]


def test_a_static_cache_is_made_as_wide_as_each_layer(family: str) -> None:
    uneven, rotated = sliced(family, "cut"), sliced(family, "rotated")
    assert uneven._get_static_cache_init_shape() is None  # queries' and values' widths differ
    heads = dense(family).config
    kv = getattr(heads, "num_key_value_heads", None) or heads.num_attention_heads
    assert rotated._get_static_cache_init_shape() == ([kv] * 2, [8] * 2)
    cache = StaticCache(config=uneven.config, max_cache_len=30)
    whole = logits(uneven)
    steps = [logits(uneven, i, past_key_values=cache) for i in IDS.split(7, 1)]
    assert relative_error(whole, torch.cat(steps, 1)) <= NEAR
    widths = [layer.values.shape[-1] for layer in cache.layers]
    assert len(set(widths)) == 2 and all(w < 8 for w in widths)


# A2: attention, outputs, caches that are not wanted, prompts that are learned


def test_an_attention_implementation_is_the_one_that_was_asked_for(
    family: str, kind: str, tmp_path: Path
) -> None:
    model = sliced(family, kind)
    eager = reloaded(model, tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    with torch.no_grad():
        out = eager(input_ids=IDS, output_attentions=True)
    assert relative_error(logits(model), out.logits) <= NEAR
    assert len(out.attentions) == 2
    assert all(torch.allclose(a.sum(-1), torch.ones(())) for a in out.attentions)
    if kind == "rotated":
        own = copy.deepcopy(dense(family))
        own.set_attn_implementation("eager")
        theirs = own(input_ids=IDS, output_attentions=True).attentions
        assert all(
            relative_error(t, a) <= NEAR for t, a in zip(theirs, out.attentions, strict=True)
        )
    model.set_attn_implementation("eager")
    assert model(input_ids=IDS, output_attentions=True).attentions[0] is not None


def test_hidden_states_are_recorded_by_argument_and_by_config(family: str, kind: str) -> None:
    model = sliced(family, kind)
    out = model(input_ids=IDS, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(IDS)) or family == "opt"
    assert model(input_ids=IDS).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(input_ids=IDS).hidden_states) == 3
    parts = model(input_ids=IDS, return_dict=False)
    assert torch.equal(parts[0], out.logits)


def test_no_cache_is_kept_where_none_is_wanted(family: str, tmp_path: Path) -> None:
    model = sliced(family, "cut")
    assert model(input_ids=IDS).past_key_values is not None
    assert model(input_ids=IDS, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(input_ids=IDS).past_key_values is None
    loaded = reloaded(sliced(family, "cut"), tmp_path, use_cache=False)
    assert loaded(input_ids=IDS).past_key_values is None


ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "lora": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q", "v", "up", "down"], r=2, init_lora_weights=False
    ),
    "all": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_peft_are_trained_on_it(
    family: str, kind: str, name: str, tmp_path: Path
) -> None:
    model = sliced(family, kind)
    before = logits(model)
    adapted = peft.get_peft_model(model, ADAPTERS[name]())
    loss = adapted(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
    loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    adapted.eval()
    assert len(adapted.generate(input_ids=IDS[:, :5], max_new_tokens=3)[0]) >= 8
    adapted.save_pretrained(tmp_path / "adapter")
    if name == "lora":
        ours = logits(adapted)
        assert relative_error(before, ours) > 1e-4
        merged = adapted.merge_and_unload()
        assert isinstance(merged, InvarianceForCausalLM)
        assert relative_error(ours, logits(merged)) <= NEAR


# A3: tables that grow, layers that stay whole


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [VOCABULARY + 9, VOCABULARY - 8])
def test_tables_are_resized_and_saved(
    family: str, kind: str, size: int, tied: bool, tmp_path: Path
) -> None:
    tie = "keep" if tied and family not in ("opt", "phi") else "untie"
    model = sliced(family, kind, tie, tie_word_embeddings=tied)
    before = logits(model, IDS % 30)
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.get_input_embeddings().num_embeddings == size == model.config.vocab_size
    n = min(size, VOCABULARY)
    after = logits(model, IDS % 30)
    assert after.shape[-1] == size and torch.equal(after[..., :n], before[..., :n])
    loaded = reloaded(model, tmp_path)
    assert torch.equal(logits(loaded, IDS % 30), after)
    one = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert one == (tie == "keep") == loaded.config.tie_word_embeddings


def test_blocks_stay_whole_where_models_are_placed_or_wrapped(family: str, tmp_path: Path) -> None:
    from accelerate import infer_auto_device_map
    from accelerate.utils.dataclasses import get_module_class_from_name

    model = sliced(family, "cut")
    names = model._no_split_modules
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    (kind,) = (get_module_class_from_name(model, n) for n in names if n.endswith("DecoderLayer"))
    assert all(isinstance(block, kind) for block in layers)
    size = max(sum(p.nbytes for p in block.parameters()) for block in layers)
    half = 1.5 * size + model.get_input_embeddings().weight.nbytes
    placed = infer_auto_device_map(
        model, {0: half, "cpu": 10**9}, no_split_module_classes=list(names)
    )
    assert len(set(placed.values())) == 2
    assert not any(".stages." in name for name in placed)
    loaded = reloaded(model, tmp_path, device_map="cpu")
    assert torch.equal(logits(loaded), logits(model))


def test_checkpointed_gradients_are_the_gradients(family: str, kind: str) -> None:
    found = []
    for checkpointed in (False, True):
        model = sliced(family, kind).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))


# A11: training and eval mode


def test_dropout_is_for_training_alone(family: str, tmp_path: Path) -> None:
    model = sliced(family, "rotated", attention_dropout=0.3)
    own = dense(family, attention_dropout=0.3)
    assert not any(m.training for m in model.modules())
    assert relative_error(logits(own), logits(model)) <= NEAR
    loaded = reloaded(model, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    bases = elements(canonicalize(double_copy(own), fold=True), ["x.0.0"], 0)
    assert certify(own, bases, IDS, fold=True).passed
    torch.manual_seed(0)
    assert relative_error(logits(model), logits(model.train())) > 1e-3


# What tools of torch do


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt"])
def test_it_is_exported_and_compiled_whole(name: str) -> None:
    model = sliced(name, "cut")
    with torch.no_grad():
        program = torch.export.export(
            model,
            (),
            {"input_ids": IDS.repeat(2, 1), "use_cache": False},
            dynamic_shapes={"input_ids": {1: torch.export.Dim("T", max=128)}, "use_cache": None},
            strict=False,
        )
        other = IDS[:, :11].repeat(2, 1)
        assert (
            relative_error(
                logits(model, other), program.module()(input_ids=other, use_cache=False).logits
            )
            <= NEAR
        )
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert relative_error(logits(model), logits(compiled, use_cache=False)) <= NEAR
    torch._dynamo.reset()


# Reading and writing


def test_a_config_alone_makes_a_model_of_random_weights(family: str, kind: str) -> None:
    config = sliced(family, kind).config
    torch.empty(10**6).fill_(float("nan"))  # which what is not drawn may find in its place
    model = AutoModelForCausalLM.from_config(config).eval()
    assert all(bool((p.abs() < 10).all()) for p in model.parameters())
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in sliced(family, kind).named_parameters()
    }
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert len(tokens(model, IDS)[0]) == 12
    with torch.device("meta"):
        assert all(p.is_meta for p in AutoModelForCausalLM.from_config(config).parameters())


def test_it_is_a_source_like_any_other(family: str, kind: str, tmp_path: Path) -> None:
    model = sliced(family, kind)
    model.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    assert list(source.names) == list(live(model).names) and source.digest() == live(model).digest()
    assert type(source.skeleton) is type(model)


def as_earlier(folder: Path) -> None:
    """The checkpoint as version 0.1.0 of July wrote it: a config in a config, a model in a model."""
    config = json.loads((folder / "config.json").read_text())
    form = config.pop("invariance")
    own = {"dtype": config["dtype"], "transformers_version": config["transformers_version"]}
    own["tie_word_embeddings"] = config["tie_word_embeddings"]
    original = {**config, **form.pop("dense"), "model_type": form.pop("family")}
    form.pop("version")
    made = {"model_type": "invariance", "original": original, "vocab_size": 41, **form, **own}
    (folder / "config.json").write_text(json.dumps(made))
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {f"inner.{n}": t for n, t in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def test_checkpoints_of_earlier_versions_load(family: str, kind: str, tmp_path: Path) -> None:
    model = sliced(family, kind)
    model.save_pretrained(tmp_path / "old")
    as_earlier(tmp_path / "old")
    source = open_source(str(tmp_path / "old"))
    assert source.digest() == live(model).digest()
    for loaded in (
        load_model(str(tmp_path / "old")),
        AutoModelForCausalLM.from_pretrained(tmp_path / "old"),
    ):
        assert torch.equal(logits(loaded), logits(model))
    again = reloaded(loaded, tmp_path / "new")
    assert torch.equal(logits(again), logits(model))
    assert not any(n.startswith("inner") for n in load_file(tmp_path / "new/model.safetensors"))
    assert "key_prefix" not in (tmp_path / "new" / "config.json").read_text()


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no form": (lambda c: c.pop("invariance"), "no 'invariance'"),
    "negative": (lambda c: c["invariance"]["widths"].update({"mlp.1": -3}), r"widths\.mlp\.1"),
    "too wide": (
        lambda c: c["invariance"]["widths"].update({"mlp.1": 65}),
        "65 is more than the 64",
    ),
    "no such space": (lambda c: c["invariance"]["widths"].update({"mlp.9": 6}), "no space 'mlp.9'"),
    "no number": (lambda c: c["invariance"]["widths"].update({"mlp.1": "x"}), r"widths\.mlp\.1"),
    "unknown key": (lambda c: c["invariance"].update(colour=3), r"invariance\.colour"),
    "later": (lambda c: c["invariance"].update(version=3), r"invariance\.version"),
    "family": (lambda c: c["invariance"].update(family="llamma"), "no model type 'llamma'"),
    "pairs": (lambda c: c["invariance"].update(pairs={"qk.0": 40}), "wider than its heads"),
    "no pairs": (lambda c: c["invariance"].update(pairs={"vo.0": 1}), "no rotary space 'vo.0'"),
    "stage": (lambda c: c["invariance"].update(shortcuts=["x"]), "no stage 'x'"),
    "rank": (lambda c: c["invariance"].update(ranks={"x": 2}), "no point 'x'"),
    "bias": (lambda c: c["invariance"].update(biases=["lm_head.bias"]), "no bias of a block"),
    "matrix": (lambda c: c["invariance"].update(split=["edge.7.down"]), "edge.7.down"),
    "tie": (lambda c: c["invariance"].update(tie="maybe"), r"invariance(\.|: )tie"),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("read", [open_source, AutoModelForCausalLM.from_pretrained])
def test_a_config_that_lies_is_refused_with_its_key(
    name: str, read: Callable[[str], Any], tmp_path: Path
) -> None:
    sliced("llama", "cut").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change, says = DAMAGE[name]
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=says) as caught:
        read(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_widths_that_the_weights_have_not_are_refused_by_tensor(tmp_path: Path) -> None:
    sliced("llama", "cut").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["invariance"]["widths"]["mlp.1"] -= 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (open_source, load_model):
        with pytest.raises(InputError, match=r"wrong shape: model\.layers\.1\.stages\.1\.mlp"):
            read(str(tmp_path))


def test_plain_transformers_says_that_it_does_not_know_the_type(tmp_path: Path) -> None:
    sliced("llama", "rotated").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "invariance"
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, InvarianceConfig) and config == load_config(str(tmp_path))
