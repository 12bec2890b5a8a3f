"""How much memory commands take, beside the floor of what they ran on: `python benchmarks/memory.py FOLDER --shape 135M`.

Random bf16 checkpoints of well-known shapes are made in FOLDER and removed afterwards. Each command runs in a process of its
own, on 8 × 256 tokens or the fewest that it accepts. Its floor is what no run that goes block by block can do without:

    floor = one block in its dtype + its moments in float64 + hidden states + imports

with moments Σ copies · dim² · 8 bytes over the spaces in one block that the recipe measures, hidden states
sequences · tokens · width · itemsize, and IMPORTS what `import invariance` takes.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from invariance.compress.planner import plan
from invariance.io.skeleton import skeleton, tensors
from invariance.recipe.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
SHAPES = {  # layers, width, MLP width, heads, KV heads, vocabulary, tied
    "tiny": (4, 64, 128, 4, 2, 512, True),
    "135M": (30, 576, 1536, 9, 3, 49152, True),
    "1B": (16, 2048, 8192, 32, 8, 128256, True),
    "8B": (32, 4096, 14336, 32, 8, 128256, False),
    "70B": (80, 8192, 28672, 64, 8, 128256, False),
}
COMMANDS = ("verify", "mlp", "global-basis", "slicegpt", "best-stock")
SEQUENCES, TOKENS = 8, 256
SHARD = 2**30


@dataclass(frozen=True)
class Row:
    """What a command took: peak and floor in bytes, seconds, and whether it ended well."""

    command: str
    peak: int
    floor: int
    seconds: float
    status: int


def make(folder: Path, shape: str, layers: int | None = None) -> int:
    """A random checkpoint, shard by shard, or its first layers with all that stands around them; its bytes."""
    depth, width, mlp, heads, kv, vocabulary, tied = SHAPES[shape]
    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=layers or depth,
        hidden_size=width,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=width // heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    g, index, held, total = torch.Generator().manual_seed(0), {}, {}, 0
    names = tensors(skeleton(config))
    for n, (name, blank) in enumerate(names.items()):
        made = torch.ones(blank.shape, dtype=torch.bfloat16)
        if blank.ndim > 1:
            made = torch.empty(blank.shape, dtype=torch.bfloat16)
            for rows in made.split(4096):
                rows.copy_(torch.randn(rows.shape, generator=g) * blank.shape[1] ** -0.5)
        held[name] = made
        total += made.nbytes
        if sum(t.nbytes for t in held.values()) >= SHARD or n == len(names) - 1:
            file = f"model-{len(set(index.values())):05}.safetensors"
            save_file(held, folder / file, {"format": "pt"})
            index |= dict.fromkeys(held, file)
            held = {}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    config.save_pretrained(folder)
    ids = np.random.default_rng(0).integers(0, vocabulary, (128, TOKENS))
    np.save(folder / "tokens.npy", ids.astype(np.int64))
    return total


def arguments(command: str, model: Path, sequences: int, output: Path) -> list[str]:
    if command == "verify":
        return ["verify", str(model), "--device", "cpu"]
    settings = {
        "model": model,
        "calibrate.data": model / "tokens.npy",
        "calibrate.sequences": sequences,
        "calibrate.tokens": TOKENS,
        "calibrate.batch": 2,
        "evaluate": "null",
    }
    sets = [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]
    recipe = RECIPES / f"{command}.yaml"
    return ["run", str(recipe), *sets, "--output", str(output), "--device", "cpu", "--overwrite"]


def floor(command: str, shape: str, model: Path, sequences: int, imports: int) -> int:
    _, width, mlp, heads, kv, _, _ = SHAPES[shape]
    d = width // heads
    block = 2 * (2 * width * heads * d + 2 * width * kv * d + 3 * width * mlp)
    if command == "verify":
        return 4 * block + imports  # float64
    recipe = load_recipe(RECIPES / f"{command}.yaml", [f"model={model}"])
    chart = plan(recipe, AutoConfig.from_pretrained(model))
    of_block = [chart.layout.spaces[n] for n in chart.wanted() if n.split(".")[1] == "0"]
    moments = sum(8 * s.copies * s.seen**2 for s in of_block)
    return block + moments + 4 * sequences * TOKENS * width + imports


def measure(command: str, shape: str, model: Path, output: Path, imports: int) -> Row:
    fewest = -(
        -max(SHAPES[shape][2] if command in ("mlp", "best-stock") else SHAPES[shape][1], 1)
        // TOKENS
    )
    sequences = max(SEQUENCES, fewest)
    line = [sys.executable, "-c", "from invariance.cli import main; main()"]
    line += arguments(command, model, sequences, output)
    started = time.perf_counter()
    done = subprocess.run([*_limited(), *line], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    peak = int(done.stderr.rpartition("PEAK=")[2].split()[0])
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
    shutil.rmtree(output, ignore_errors=True)
    asked = floor(command, shape, model, sequences, imports)
    return Row(command, peak, asked, seconds, done.returncode)


def _limited() -> list[str]:
    """A process that says on standard error how much memory the one within it took."""
    code = (
        "import resource, subprocess, sys; r = subprocess.run(sys.argv[1:]).returncode; "
        "print(f'PEAK={resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}', file=sys.stderr); "
        "sys.exit(r)"
    )
    return [sys.executable, "-c", code]


def rows(commands: list[str], shape: str, layers: int | None, folder: Path) -> Iterator[Row]:
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = folder / shape
    try:
        size = make(model, shape, layers)
        print(f"{shape}: checkpoint {size / 1e9:.2f} GB, imports {imports / 1e9:.2f} GB")
        for command in commands:
            yield measure(command, shape, model, folder / "out", imports)
    finally:
        shutil.rmtree(model, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--layers", type=int, help="this many layers of the shape, not all of them")
    parser.add_argument("--commands", default=",".join(COMMANDS))
    asked = parser.parse_args()
    print(f"{'command':14} {'peak GB':>8} {'floor GB':>9} {'allowed':>8} {'seconds':>8}  status")
    for row in rows(asked.commands.split(","), asked.shape, asked.layers, asked.folder):
        allowed = 1.5 * row.floor + 0.5e9
        print(
            f"{row.command:14} {row.peak / 1e9:8.2f} {row.floor / 1e9:9.2f} {allowed / 1e9:8.2f} "
            f"{row.seconds:8.0f}  {row.status}",
            flush=True,
        )


if __name__ == "__main__":
    main()
