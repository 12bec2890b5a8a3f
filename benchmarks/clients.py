"""Every stock recipe's checkpoint in other programs: transformers 4 and llama.cpp, by logits and 64 greedy tokens.

`make clients` installs them beside the package, into a folder of their own, and runs this. By default the model is a small random
one with a real tokenizer, so that all recipes take half an hour; any other is named by ``--model``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import invariance
from invariance.core.errors import InvarianceError
from invariance.io.clients import save_tokenizer
from invariance.model.verify import tolerance
from invariance.recipe.recipe import load_recipe
from invariance.run.run import run

ROOT = Path(__file__).parents[1]
TOKENIZER = "packaged:smollm2-135m-instruct"
PROMPT = "The people of the United States are free, and the people of the"
TOKENS = 64
SMALLER = {"shortgpt": ["steps.0.select={shortgpt: {blocks: 1}}"]}

OLDER = """
import json, sys, numpy, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))[None]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
transformers.AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    numpy.save(sys.argv[3], model(ids).logits[0].numpy())
out = model.generate(ids, max_new_tokens=int(sys.argv[4]), min_new_tokens=int(sys.argv[4]), do_sample=False)
print(json.dumps(out[0, ids.shape[1]:].tolist()))
"""
LLAMA = """
import json, sys, xllamacpp as xlc
params = xlc.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers = sys.argv[1], 512, 0
params.cpuparams.n_threads = 2
params.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it computes in float16
params.cache_type_k = params.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
server = xlc.Server(params)
asked = {"prompt": json.loads(sys.argv[2]), "n_predict": int(sys.argv[3]), "temperature": 0, "top_k": 1, "ignore_eos": True,
         "n_probs": 10, "cache_prompt": False, "stream": False}
found = server.handle_completions(asked)
found = json.loads(found) if isinstance(found, str) else found
each = found["choices"][0]["logprobs"]["content"]
first = {str(p["id"]): p["logprob"] for p in each[0]["top_logprobs"]}
print("RESULT " + json.dumps([[token["id"] for token in each], first]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model to slice; by default a small random one")
    parser.add_argument("--recipes", nargs="*", help="names of recipes; by default all that ship")
    parser.add_argument("--clients", default=os.environ.get("INVARIANCE_CLIENTS", ".venv/clients"))
    given = parser.parse_args()
    names = given.recipes or sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ.setdefault("INVARIANCE_CACHE", str(root / "cache"))
        tokenizer = invariance.load_tokenizer(given.model or TOKENIZER)
        model = given.model or str(_small(root / "dense", tokenizer))
        print(f"{'recipe':18} {'type':10} {'transformers 4':>22} {'llama.cpp':>22}")
        failed = False
        for name in names:
            row, fine = _row(name, model, root, tokenizer, given.clients)
            print(row, flush=True)
            failed |= not fine
    sys.exit(failed)


def _small(folder: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def _row(name: str, model: str, root: Path, tokenizer: Any, clients: str) -> tuple[str, bool]:
    path = ROOT / "recipes" / f"{name}.yaml"
    text = {"calibrate.sequences": 16, "calibrate.tokens": 128, "calibrate.dtype": "float32"}
    sets = [f"model={model}", "evaluate=null", *SMALLER.get(name, [])]
    if load_recipe(path).calibrate is not None:
        sets += [f"{key}={value}" for key, value in text.items()]
    try:
        report = run(path, root / name, sets)
    except InvarianceError as e:
        return f"{name:18} not made: {str(e)[:90]}", True
    made = report["model"]
    if not made["stock"] or report["quantize"]:
        return f"{name:18} {made['exported_as']:10} no stock checkpoint of plain numbers", True
    folder = root / name / "model"
    ids = tokenizer(PROMPT).input_ids
    model = invariance.load(str(folder)).float()
    reference, greedy = _own(model, ids)
    close = tolerance(torch.float32, 2 * model.config.num_hidden_layers)
    older = _older(folder, ids, clients)
    error = float(np.linalg.norm(older[0] - reference) / np.linalg.norm(reference))
    same = _agree(greedy, older[1])
    cells, fine = [f"{error:.0e}, {same}/{TOKENS}"], error <= close and same == TOKENS
    known = " ".join(made["misread"])
    try:
        tokens, logprobs = _llama(folder, ids, clients)
        p = torch.tensor(reference[-1]).log_softmax(-1)
        apart = max(abs(p[int(i)].item() - lp) for i, lp in logprobs.items())
        same = _agree(greedy, tokens)
        cells.append(f"{apart:.0e}, {same}/{TOKENS}")
        near = apart <= close * np.linalg.norm(reference[-1])
        fine &= bool(known) or (near and same == TOKENS)
    except subprocess.CalledProcessError as e:
        cells.append(f"fails: {(e.stderr or '').strip().splitlines()[-1:]}")
        fine = False
    return f"{name:18} {made['exported_as']:10} {cells[0]:>22} {cells[1]:>22}  {known}", fine


def _agree(one: list[int], other: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@torch.no_grad()
def _own(model: PreTrainedModel, ids: list[int]) -> tuple[np.ndarray, list[int]]:
    tokens = torch.tensor(ids)[None]
    out = model.generate(  # type: ignore[operator]
        tokens, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
    )
    return model(tokens).logits[0].numpy(), out[0, len(ids) :].tolist()


def _older(folder: Path, ids: list[int], clients: str) -> tuple[np.ndarray, list[int]]:
    out = folder.parent / "older.npy"
    words = [str(folder), json.dumps(ids), str(out), str(TOKENS)]
    said = _python(["-c", OLDER, *words], clients)
    return np.load(out), json.loads(said.splitlines()[-1])


def _llama(folder: Path, ids: list[int], clients: str) -> tuple[list[int], dict[str, float]]:
    gguf = folder.parent / "model.gguf"
    converter = str(Path(clients) / "convert_hf_to_gguf.py")
    _python([converter, str(folder), "--outfile", str(gguf), "--outtype", "f32"], clients)
    said = _python(["-c", LLAMA, str(gguf), json.dumps(ids), str(TOKENS)], clients)
    line = next(x for x in said.splitlines() if x.startswith("RESULT "))
    tokens, logprobs = json.loads(line.removeprefix("RESULT "))
    return tokens, logprobs


def _python(words: list[str], clients: str) -> str:
    """What another Python prints that finds the clients first."""
    environment = os.environ | {"PYTHONPATH": os.path.abspath(clients), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout


if __name__ == "__main__":
    main()
