"""How much hypothesis draws, and a quiet, modest torch."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from transformers.utils import logging

from invariance.method import interfaces
from invariance.report import figures

_SLOW_IS_FINE = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.function_scoped_fixture,
]
_PHASES = (
    Phase.explicit,
    Phase.reuse,
    Phase.generate,
)  # shrinking a failing model test takes minutes

settings.register_profile(
    "ci",
    max_examples=25,
    derandomize=True,
    deadline=None,
    phases=_PHASES,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.register_profile(
    "thorough", max_examples=400, deadline=None, phases=_PHASES, suppress_health_check=_SLOW_IS_FINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
torch.set_num_threads(1)  # at these sizes two threads mostly wait for each other
logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def quick_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures embed fonts of a kind that takes a sixth of the time; tests read no fonts."""
    monkeypatch.setitem(figures.STYLE, "pdf.fonttype", 3)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    interfaces.registry("rotate")
    monkeypatch.setattr(interfaces, "_REGISTRY", copy.deepcopy(interfaces._REGISTRY))
