"""Recovery whose weights are shared out among processes, and in half precision: the same training, to rounding."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import VOCABULARY, overrides, save_model, save_tokens
from safetensors.torch import load_file

from invariance.core.errors import InputError
from invariance.io.data import Tokens, load_tokens
from invariance.io.models import load_model
from invariance.measure.evaluate import perplexity
from invariance.model.verify import tolerance
from invariance.recipe.recover import Recover
from invariance.recover.module import HELD_OUT, Recovery
from invariance.recover.training import Training
from invariance.run import recover as recover_run

TRAINING: dict[str, Any] = {
    "held_out": 4,
    "batch": 2,
    "checks": 2,
    "learning_rate": 1e-2,
    "train": {"data": "tokens.npy"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    save_tokens(tmp_path / "tokens.npy", sequences=24)
    return tmp_path


def recovered(name: str, trainer: Mapping[str, Any], **keys: Any) -> list[float]:
    """The held-out losses of a recovery in this process, and a folder of that name."""
    asked = Recover.model_validate(TRAINING | keys | {"trainer": trainer})
    found = recover_run.run("model", Path(name), Training(asked))["recover"]["curve"]
    return [point[HELD_OUT] for point in found]


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_weights_in_parts_train_as_whole_ones_with_accumulation(weights: str) -> None:
    one = recovered("one", {"accumulate_grad_batches": 2}, weights=weights)
    half = recovered("half", {}, weights=weights)
    keys = {
        "train.data": "tokens.npy",
        "weights": weights,
        "trainer.devices": 2,
        "trainer.strategy": "fsdp",
        **{k: v for k, v in TRAINING.items() if k != "train"},
    }
    sets = [part for pair in overrides(keys) for part in ("--set", pair)]
    script = Path("start.py")  # which is started again in the second process
    script.write_text("from invariance.cli import main\n\nmain()\n")
    command = [sys.executable, str(script), "recover", "model", "--output", "two", *sets, "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(Path("two/recover.json").read_text())["recover"]
    two = [point[HELD_OUT] for point in found["curve"]]
    bound = found["steps"] * tolerance(torch.float32, 4)  # what one step may err by, every step
    assert max(abs(a - b) / b for a, b in zip(one, two, strict=True)) <= bound
    assert abs(half[-1] - two[-1]) / two[-1] > bound
    written = load_model("two/model")
    held = load_tokens("tokens.npy", None, vocab_size=VOCABULARY)
    held = Tokens(held.ids[-TRAINING["held_out"] :], held.mask[-TRAINING["held_out"] :])
    assert abs(math.log(perplexity(written, held, 2)) - min(two)) <= tolerance(
        torch.float32, 4
    ) * min(two)


def test_half_precision_trains_in_half_measures_and_keeps_in_single(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: set[tuple[bool, torch.dtype]] = set()
    forward = Recovery.forward

    def watched(module: Recovery, *args: Any) -> torch.Tensor:
        found = forward(module, *args)
        seen.add((module.training, found.dtype))
        return found

    monkeypatch.setattr(Recovery, "forward", watched)
    for precision, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
        losses = recovered(precision, {"precision": precision})
        assert seen == {(True, dtype), (False, torch.float32)} and losses[-1] < losses[0]
        learned = load_file(f"{precision}/model/model.safetensors")
        assert {t.dtype for t in learned.values()} == {torch.float32}
        seen.clear()


def test_parts_need_processes_to_lie_in() -> None:
    with pytest.raises(InputError, match="devices: 2"):
        recovered("none", {"strategy": "fsdp"})
    assert not Path("none").exists()
