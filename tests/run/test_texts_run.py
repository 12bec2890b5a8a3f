"""A run on a mixture: what calibrated it is in the report, and so is what each text lost."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import LENGTH, VOCABULARY, tiny

from invariance.core.errors import InputError
from invariance.recipe.recipe import Recipe
from invariance.run.outcome import outcome


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.save(f"{name}.npy", rng.integers(VOCABULARY, size=(20, 12)))
    return tmp_path


def recipe() -> Recipe:
    mixture = [{"data": "a.npy", "share": 2.0}, {"data": "self", "share": 1.0, "name": "own"}]
    return Recipe.from_dict(
        {
            "model": "tiny",
            "calibrate": {"data": mixture, "sequences": 9, "tokens": 12},
            "steps": [{"spaces": "mlp", "rotate": "obs", "select": {"uniform": {"keep": 0.5}}}],
            "evaluate": [
                {"perplexity": {"data": "a.npy"}},
                {"perplexity": {"data": "b.npy"}},
                {"perplexity": {"data": "self", "sequences": 3, "tokens": 8, "name": "written"}},
            ],
        }
    )


def test_a_run_tells_what_calibrated_it_and_what_each_text_lost(folder):
    report = outcome(tiny("llama"), recipe()).report
    told = report["data"]["calibration"]
    assert [(t["name"], t["data"], t["sequences"]) for t in told] == [
        ("a.npy", "a.npy", 6),
        ("own", "self", 3),
    ]
    assert report["data"]["training"] == []
    each = report["texts"]["each"]
    assert {name: text["calibrated"] for name, text in each.items()} == {
        "a.npy": True,
        "b.npy": False,
        "written": True,
    }
    for name, text in each.items():
        found = report["perplexity"][name]
        assert text["ratio"]["sliced"] == found["sliced"] / found["dense"]
    assert report["texts"]["unseen"]["sliced"]["worst_text"] == "b.npy"


def test_text_longer_than_the_model_can_write_is_refused(folder):
    asked = recipe().to_dict()
    asked["calibrate"] = {"data": "self", "sequences": 4, "tokens": LENGTH + 1}
    with pytest.raises(InputError, match=f"<recipe>: .*{LENGTH + 1}.*{LENGTH}"):
        outcome(tiny("opt"), Recipe.from_dict(asked))
