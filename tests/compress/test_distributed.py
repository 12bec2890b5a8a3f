"""Two processes that calibrate together know what one knows, to float64 rounding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from folders import save_model, save_tokens

from invariance.calibrate.moments import Moments, Store
from invariance.compress import calibration, distributed
from invariance.compress.execution import Execution
from invariance.compress.plan import Plan
from invariance.compress.planner import plan
from invariance.core.cache import cache_dir
from invariance.core.errors import InputError
from invariance.io.data import load_tokens
from invariance.io.models import load_model
from invariance.recipe.recipe import Recipe

BATCHES = 4


def asked(root: Path, batch: int) -> Plan:
    recipe = Recipe.from_dict(
        {
            "model": str(root / "model"),
            "calibrate": {"data": str(root / "tokens.npy"), "dtype": "float32", "batch": batch},
            "steps": [
                {
                    "spaces": "residual",
                    "rotate": {"pca": {"of": "normed"}},
                    "select": {"uniform": {"width": 24}},
                },
                {
                    "spaces": "mlp",
                    "rotate": "permute",
                    "select": {"uniform": {"keep": 0.5}},
                    "slice": "least_squares",
                },
            ],
        }
    )
    return plan(recipe, load_model(str(root / "model")).config)


def stored(cache: Path, chart: Plan) -> Moments:
    (folder,) = (cache / "moments").iterdir()
    keys = [(name, s) for name, statistics in chart.of_dense().items() for s in statistics]
    found = Store(folder).load(keys)
    assert set(found.known) == set(keys)
    return found


def differences(one: Moments, other: Moments) -> Mapping[object, float]:
    return {
        k: ((m.total - other.known[k].total).norm() / m.total.norm()).item()
        for k, m in one.known.items()
    }


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_model(tmp_path / "model")
    save_tokens(tmp_path / "tokens.npy")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_equal_one_to_rounding_and_half_of_the_batches_do_not(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chart = asked(root, batch=16 // BATCHES)
    tokens = load_tokens(str(root / "tokens.npy"), None, vocab_size=41)
    model = load_model(str(root / "model"))
    monkeypatch.setenv("INVARIANCE_CACHE", str(root / "one"))
    calibration.calibrate(model, [chart], tokens, store=cache_dir("moments"))
    monkeypatch.setenv("INVARIANCE_CACHE", str(root / "two"))
    # forked, which saves the imports; only because torch has one thread here
    monkeypatch.setattr(distributed, "START", "ddp_fork")
    distributed.calibrate([chart], tokens, Execution(processes=2, threads=1))
    monkeypatch.setenv("INVARIANCE_CACHE", str(root / "half"))
    half = calibration.Share(
        0, 2, lambda moments: moments
    )  # what one of the two would know without the other
    calibration.calibrate(model, [chart], tokens, store=cache_dir("moments"), share=half)
    one, two, unmerged = (stored(root / name, chart) for name in ("one", "two", "half"))
    # the same float64 terms in another order: n - 1 additions err by at most that many roundings, in either order
    bound = 2 * (BATCHES - 1) * torch.finfo(torch.float64).eps
    assert max(differences(one, two).values()) <= bound
    assert all(abs(m.count - two.known[k].count) <= bound * m.count for k, m in one.known.items())
    assert min(differences(one, unmerged).values()) > 1e6 * bound


def test_more_processes_than_batches_are_refused(root: Path) -> None:
    tokens = load_tokens(str(root / "tokens.npy"), None, vocab_size=41)
    with pytest.raises(InputError, match="1 batches for 2 processes"):
        distributed.calibrate([asked(root, batch=16)], tokens, Execution(processes=2))
