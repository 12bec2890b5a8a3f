"""A study on a tiny model, and how tests run one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import invoke, save_model, save_tokens

from invariance.study import job as study_job

BASE = """\
base:
  model: ROOT/model
  calibrate: {data: ROOT/tokens.npy, dtype: float32}
  steps:
    - {spaces: residual, rotate: pca, select: {uniform: {width: 24}}}
  evaluate: [{perplexity: {data: ROOT/test.npy, name: held out}}]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("ablate")
    save_model(root / "model")
    save_tokens(root / "tokens.npy")
    save_tokens(root / "test.npy", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(root)
        yield root


@pytest.fixture(autouse=True)
def no_model_in_memory() -> Iterator[None]:
    study_job._BENCHES.clear()
    yield


def write(root: Path, text: str, name: str = "s.yaml") -> Path:
    (root / name).write_text(text.replace("ROOT", str(root)))
    return root / name


def ablate(
    root: Path, text: str, output: str, *more: object, status: int = 0
) -> tuple[list[dict[str, Any]], str]:
    """The rows and what was said on the way."""
    found, out, err = invoke(
        "ablate", write(root, text), "--output", root / output, "--json", *more
    )
    assert found == status, err
    assert "Traceback" not in err
    return json.loads(out)["rows"], err
