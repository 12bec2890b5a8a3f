"""What is not understood freezes what it meets: no label never means free."""

from __future__ import annotations

import pytest
import torch
from derive_models import check, normal
from torch import nn

from invariance.model.derive import Kind
from invariance.model.derive.rules.table import RULES


class Net(nn.Module):
    """A stream between two linear maps, with ``op`` on it."""

    def __init__(self, op) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 4)
        self.op = op
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.op(self.up(x)))


def stream(op):
    model = Net(op)
    own, certificate = check(model, lambda seed: {"x": normal(3, 6, 5, seed=seed)})
    carried = ("up.weight", 0)
    return own, certificate, [b for b in certificate.blocks if carried in b.where]


def test_a_linear_stream_is_free_under_gl() -> None:
    own, certificate, blocks = stream(lambda x: x)
    assert certificate.passed and [b.kind for b in blocks] == [Kind.GL] and not own.unknown


@pytest.mark.parametrize("op", [torch.fft.fft, torch.special.i0, lambda x: torch.linalg.svd(x)[2]])
def test_an_op_without_a_rule_leaves_nothing_free(op) -> None:
    def real(x):
        y = op(x)
        return y.real[..., :8, :] if y.is_complex() else y

    own, certificate, blocks = stream(real)
    assert own.unknown and not blocks and not certificate.refuted


def test_a_rule_that_fails_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(record, call):
        raise ZeroDivisionError("a fault in a rule")

    monkeypatch.setitem(RULES, "silu", fail)
    own, _certificate, blocks = stream(nn.functional.silu)
    assert not blocks and any("ZeroDivisionError" in op for op in own.unknown)


@pytest.mark.parametrize(
    "op, kind",
    [
        (nn.functional.silu, Kind.PERM),
        (torch.relu, Kind.PERM),
        (lambda x: x * x.square().mean(-1, keepdim=True).rsqrt(), Kind.O),
        (lambda x: nn.functional.layer_norm(x, (8,)), Kind.O1),
        (lambda x: x + 1.0, Kind.PERM),
        (lambda x: x * torch.arange(1.0, 9.0), None),
        (lambda x: x.cumsum(-1), None),
        (lambda x: x.sort(-1).values, None),
        (lambda x: torch.where(x > 0, x, 2 * x), Kind.PERM),
        (lambda x: x.amax(-1, keepdim=True) + x, Kind.PERM),
    ],
)
def test_each_kind_of_op_narrows_the_group_as_it_must(op, kind: Kind | None) -> None:
    _, certificate, blocks = stream(op)
    assert not certificate.refuted
    kinds = [b.kind for b in blocks if len(b.classes) == 8]
    assert kinds == ([kind] if kind else [])


def test_a_constant_that_varies_over_heads_keeps_heads_apart() -> None:
    """Values without coordinates, beside coordinates that repeat, tell coordinates apart (gated delta rules)."""
    values = normal(3, 6, 8, seed=99)
    _, certificate, blocks = stream(lambda x: torch.sigmoid(x) * values)
    assert not certificate.refuted and not blocks


def test_a_sum_over_other_axes_is_not_taken_for_rotary_positions() -> None:
    """A scaled space beside one along other axes: dropped by a slice, it was free once (state-space models)."""

    def op(x):
        one = x * torch.arange(1.0, 9.0)
        return (one + normal(6, 1, seed=1))[..., :4, :]

    _, certificate, blocks = stream(op)
    assert not certificate.refuted and not blocks
