"""A declaration that does not say all that a family computes is noticed where its config says that it matters."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoConfig

from invariance.calibrate import declared
from invariance.calibrate.declared import check_declared
from invariance.core.errors import CertificateError
from invariance.model.families import FAMILIES, SHIPPED


def test_queries_that_far_positions_scale_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "ministral3", FAMILIES["llama"])
    with pytest.raises(CertificateError, match=r"'ministral3'.*does not hold at .*positions"):
        check_declared(AutoConfig.for_model("ministral3"))


@pytest.mark.parametrize("kind", SHIPPED)
def test_honest_declarations_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        FAMILIES, kind, replace(FAMILIES[kind])
    )  # as a plugin's, not one that ships
    check_declared(AutoConfig.for_model(kind))


def test_what_ships_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declared, "built", None)
    check_declared(AutoConfig.for_model("llama"))
