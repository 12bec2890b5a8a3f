"""Rotators of one matrix in two factors against the closed forms of their papers, written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from invariance.calibrate.moments import Moment, Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.group import Group
from invariance.core.space import Space
from invariance.method.interfaces import NATS, find

OUT, IN, KEPT = 9, 6, 2


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, the second moment of its inputs, the Fisher where it writes."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(OUT, IN, generator=g, dtype=torch.float64)
    X = torch.randn(50, IN, generator=g, dtype=torch.float64)
    X = X @ torch.randn(IN, IN, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, IN)
    Y = torch.randn(60, OUT, generator=g, dtype=torch.float64) * torch.logspace(0, 1, OUT)
    return W, (X.mT @ X / len(X)).double(), (Y.mT @ Y / len(Y)).double()


def root(M: Tensor) -> Tensor:
    values, Q = torch.linalg.eigh(M)
    return (Q * values.clamp_min(0).sqrt()) @ Q.mT


def basis_of(name: str, W: Tensor, C: Tensor, F: Tensor, **options: float):
    """The basis between identity and W, the matrix that is left at rank KEPT, and what the energies foretell."""
    space = Space("edge.0.down", "edge", IN, Group.INVERTIBLE)
    known = {
        (space.name, Statistic.RAW): Moment(C[None], 1),
        (space.name, Statistic.READERS): Moment((W.mT @ W)[None], 1),
        (space.name, Statistic.FISHER): Moment((W.mT @ F @ W)[None], 1),
    }
    basis = find("rotate", name)(**options).fit(space, Moments(known))
    A = basis.A.matrix()[0]
    E, D = A[:, :KEPT], torch.linalg.inv(A).mT[:, :KEPT]
    assert torch.allclose(A @ torch.linalg.inv(A), torch.eye(IN, dtype=A.dtype), atol=1e-9)
    return W @ D @ E.mT, basis.energy[0]


def test_fisher_on_both_sides_is_the_svd_of_whitened_weights_and_foretells_the_nats() -> None:
    for seed in range(5):
        W, C, F = drawn(seed)
        found, energy = basis_of("fisher_svd", W, C, F)
        U, sigma, Vt = torch.linalg.svd(root(F) @ W @ root(C), full_matrices=False)
        theirs = (
            torch.linalg.inv(root(F))
            @ (U[:, :KEPT] * sigma[:KEPT])
            @ Vt[:KEPT]
            @ torch.linalg.inv(root(C))
        )
        assert torch.allclose(found, theirs, atol=1e-6)

        def nats(M: Tensor, W: Tensor = W, C: Tensor = C, F: Tensor = F) -> float:
            return float(torch.trace(F @ (W - M) @ C @ (W - M).mT)) / 2

        assert nats(found) == pytest.approx(float(energy[KEPT:].sum()), rel=1e-6)
        one_sided, _ = basis_of("weight_svd", W, C, F)
        assert nats(found) < nats(one_sided)
    assert find("rotate", "fisher_svd")().unit == NATS


def test_asvd_is_the_svd_of_scaled_weights() -> None:
    W, C, F = drawn()
    for strength in (0.0, 0.5, 1.0):
        S = torch.diag(C.diagonal() ** (strength / 2))
        U, sigma, Vt = torch.linalg.svd(W @ S, full_matrices=False)
        theirs = (U[:, :KEPT] * sigma[:KEPT]) @ Vt[:KEPT] @ torch.linalg.inv(S)
        found, energy = basis_of("asvd", W, C, F, strength=strength)
        assert torch.allclose(found, theirs, atol=1e-8)
        assert torch.allclose(energy, sigma.square(), rtol=1e-8)


def test_with_independent_channels_asvd_at_full_strength_is_whitening() -> None:
    W, C, F = drawn(3)
    C = torch.diag(C.diagonal())
    ours, _ = basis_of("asvd", W, C, F, strength=1.0)
    theirs, _ = basis_of("weight_svd", W, C, F)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="strength"):
        find("rotate", "asvd")(strength=-1.0)
    with pytest.raises(ValueError, match="floor"):
        find("rotate", "fisher_svd")(floor=0.0)
