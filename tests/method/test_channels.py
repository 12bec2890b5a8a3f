"""Orders of channels against closed forms in plain numpy, and their loss curves against direct least squares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from invariance.methods import _channels
from invariance.methods._channels import ordered
from invariance.methods.obs import survival, without
from torch import Tensor

from invariance.calibrate.moments import Moment, Moments
from invariance.calibrate.statistic import Statistic
from invariance.compress.planner import plan
from invariance.core.change import Basis, Change
from invariance.core.dense import in_group
from invariance.core.errors import InputError
from invariance.core.group import Group
from invariance.core.pick import Pick
from invariance.core.space import Space
from invariance.method.interfaces import Rotator, find, registry
from invariance.recipe.recipe import Recipe

seeds = st.integers(0, 9999)


class Case:
    """Tokens x of correlated channels whose readers W weigh them unequally."""

    def __init__(self, seed: int, d: int = 12, n: int = 200, out: int = 7) -> None:
        g = np.random.default_rng(seed)
        mix = g.normal(size=(d, d)) * g.random((1, d)) ** 3
        self.x = (
            g.normal(size=(n, d)) @ mix.T + 0.2 * g.normal(size=(n, d)) + 0.5 * g.normal(size=d)
        )
        self.W = g.normal(size=(out, d)) * np.exp(g.normal(size=d))
        self.C, self.G = self.x.T @ self.x / n, self.W.T @ self.W
        self.F = (lambda m: m @ m.T)(g.normal(size=(d, d)) * np.exp(g.normal(size=(d, 1))))
        self.space = Space("mlp.0", "mlp", d, Group.MONOMIAL)
        found = {
            Statistic.RAW: self.C,
            Statistic.WEIGHTED: self.C,
            Statistic.READERS: self.G,
            Statistic.FISHER: self.F,
            Statistic.MEAN: self.x.mean(0),
        }
        self.moments = Moments(
            {("mlp.0", s): Moment(torch.from_numpy(m).double()[None], 1) for s, m in found.items()}
        )

    def fit(self, name: str, **options: Any) -> Basis:
        rotator: Rotator = find("rotate", name)(**options)
        return rotator.fit(self.space, self.moments)

    def loss(self, kept: np.ndarray, root: np.ndarray | None = None) -> float:
        """mean ‖W x − B x_kept‖² with the best B, found on the tokens themselves."""
        target = self.x @ (self.W if root is None else root).T
        B, *_ = np.linalg.lstsq(self.x[:, kept], target, rcond=None)
        return float(((target - self.x[:, kept] @ B) ** 2).sum(1).mean())


def order(basis: Basis) -> np.ndarray:
    assert in_group(Group.PERMUTATION, basis.A)
    return basis.A.matrix()[0].argmax(0).numpy()


def tails(basis: Basis) -> np.ndarray:
    """What cutting to k = 0, 1, … d loses."""
    energy = basis.energy[0].numpy()
    return np.append(energy[::-1].cumsum()[::-1], 0.0)


# The loss curve


@given(seed=seeds)
def test_the_loss_curve_is_that_of_direct_least_squares(seed: int) -> None:
    case = Case(seed)
    C, G = (torch.from_numpy(m)[None] for m in (case.C, case.G))
    drawn = torch.from_numpy(np.random.default_rng(seed + 1).permutation(12))[None]
    basis = ordered(drawn, C.clone(), G.clone(), noise=0)
    assert np.array_equal(order(basis), drawn[0].numpy())
    found, whole = tails(basis), float(np.trace(case.C @ case.G))
    for k in (1, 3, 6, 11):
        assert abs(found[k] - case.loss(drawn[0, :k].numpy())) <= 1e-9 * whole
    assert abs(found[0] - whole) <= 1e-9 * whole
    # The control: another order has another curve.
    other = tails(ordered(drawn.flip(-1), C, G, noise=0))
    assert abs(found[3] - other[3]) > 1e-6 * whole


@pytest.mark.parametrize("name", ["ridge_leverage", "obs"])
def test_a_rotators_energies_predict_what_a_least_squares_slice_loses(name: str) -> None:
    case = Case(3)
    basis = case.fit(name)
    slicer = find("slice", "least_squares")(ridge=0.0)
    for k in (2, 5, 9):
        change = slicer.cut(case.space, basis, k, case.moments)
        left = case.x - case.x @ (change.encode.matrix()[0] @ change.decode.matrix()[0].mT).numpy()
        lost = ((left @ case.W.T) ** 2).sum(1).mean()
        assert tails(basis)[k] == pytest.approx(
            lost, rel=1e-2
        )  # up to the noise that keeps the factor
        assert (
            basis.energy[0, k:].max().item() < 0.999 * tails(basis)[k] or k > 8
        )  # more than one counts


def test_a_moment_that_rounding_has_made_indefinite_and_a_dead_channel_are_served() -> None:
    x = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    x[:, 5] = x[:, 4]
    C = (x.mT @ x).float().double()[None] / 40
    C[:, 4, 5] += 1e-7
    C[:, 5, 4] += 1e-7
    moments = Moments({("mlp.0", s): Moment(C, 1) for s in (Statistic.WEIGHTED, Statistic.READERS)})
    for name in ("ridge_leverage", "obs"):
        basis = find("rotate", name)().fit(Space("mlp.0", "mlp", 12, Group.MONOMIAL), moments)
        assert torch.isfinite(basis.energy).all()
        assert order(basis)[-1] == 3 and set(order(basis)[-2:]) < {
            3,
            4,
            5,
        }  # the dead one, then one of the twins
    with pytest.raises(torch.linalg.LinAlgError):  # the control
        torch.linalg.cholesky(C)


# Scores


@given(seed=seeds, ridge=st.sampled_from([1e-3, 1e-2, 0.5]))
def test_ridge_leverage_orders_by_its_score(seed: int, ridge: float) -> None:
    case = Case(seed)
    lam = ridge * np.diag(case.C).mean()
    score = np.diag(case.C @ np.linalg.inv(case.C + lam * np.eye(12)))
    found = score[order(case.fit("ridge_leverage", ridge=ridge))]
    assert (np.diff(found) <= 1e-9).all()
    assert (np.diff(score) > 1e-9).any()  # the control: it was in no order before


@given(seed=seeds)
def test_fluctuation_is_the_variance_behind_the_readers(seed: int) -> None:
    case = Case(seed)
    score = case.x.var(0) * (case.W**2).sum(0)
    basis = case.fit("fluctuation")
    assert np.allclose(basis.energy[0].numpy(), score[order(basis)])
    assert (np.diff(score[order(basis)]) <= 1e-9).all()
    raw = (case.x**2).mean(0) * (case.W**2).sum(0)  # the control: with the mean it is another score
    assert not np.allclose(basis.energy[0].numpy(), raw[order(basis)])


@given(seed=seeds, groups=st.sampled_from([2, 3, 4]))
def test_a_groups_fluctuation_is_that_of_all_it_gives(seed: int, groups: int) -> None:
    case = Case(seed)
    space = Space("mlp.0", "heads", groups, Group.PERMUTATION, grain=12 // groups)
    score = (case.x.var(0) * (case.W**2).sum(0)).reshape(groups, -1).sum(1)
    basis = find("rotate", "fluctuation")().fit(space, case.moments)
    assert np.allclose(basis.energy[0].numpy(), np.sort(score)[::-1])
    assert np.array_equal(order(basis), np.argsort(-score))


@given(seed=seeds, strength=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_smooth_shares_the_channels_differences_between_signal_and_readers(
    seed: int, strength: float
) -> None:
    """x'_j has the RMS (RMS(x_j) ‖W_j‖)^(1 − α), its readers' column the rest, and W' x' is W x."""
    case = Case(seed)
    basis = case.fit("smooth", strength=strength)
    assert in_group(Group.POSITIVE_MONOMIAL, basis.A) and not in_group(Group.PERMUTATION, basis.A)
    change = Change.rotation(basis.A)
    x, W = case.x @ change.encode.matrix()[0].numpy(), case.W @ change.decode.matrix()[0].numpy()
    assert np.allclose(x @ W.T, case.x @ case.W.T)
    signal, readers = np.sqrt((x**2).mean(0)), np.linalg.norm(W, axis=0)
    both = signal * readers
    assert np.allclose(signal, both ** (1 - strength)) and np.allclose(readers, both**strength)
    assert np.allclose(basis.energy[0].numpy(), both**2) and (np.diff(both) <= 1e-9).all()
    plain = case.fit("permute")  # the control: unscaled, the signal is none of these
    before = np.sqrt(((case.x @ plain.A.matrix()[0].numpy()) ** 2).mean(0))
    assert not np.allclose(before, both ** (1 - strength))


def test_smooth_leaves_the_scale_of_channels_that_never_fire_or_that_nobody_reads() -> None:
    case = Case(0)
    for known, channel in ((Statistic.RAW, 3), (Statistic.READERS, 5)):
        total = case.moments.known["mlp.0", known].total
        total[:, channel] = total[:, :, channel] = 0
    basis = case.fit("smooth")
    assert bool(torch.isfinite(basis.A.matrix()).all())
    assert basis.A.matrix()[0, 3].amax() == basis.A.matrix()[0, 5].amax() == 1
    assert basis.A.matrix()[0, 4].amax() != 1


def direct(case: Case, ridge: float, rounds: int) -> list[int]:
    """OBS on W itself: score, remove the worst of a group, refit W and invert C anew."""
    d = len(case.C)
    C = case.C + ridge * np.diag(case.C).mean() * np.eye(d)
    alive, gone, W = list(range(d)), [], case.W.copy()
    for group in np.array_split(np.arange(d), rounds):
        inverse = np.linalg.inv(C[np.ix_(alive, alive)]) if alive else np.zeros((0, 0))
        score = (W**2).sum(0) / np.diag(inverse)
        ranked = np.argsort(score, kind="stable")
        out = ranked[: len(group)]
        stay = np.sort(ranked[len(group) :])
        names = np.array(alive)
        if len(stay) and len(out):
            known, lost = names[stay], names[out]
            refit = C[np.ix_(lost, known)] @ np.linalg.inv(C[np.ix_(known, known)])
            W = W[:, stay] + W[:, out] @ refit
        else:
            W = W[:, stay]
        gone += names[out].tolist()
        alive = names[stay].tolist()
    return gone[::-1]


@given(seed=seeds, rounds=st.sampled_from([1, 2, 4, 12, 20]))
def test_obs_in_the_readers_moment_is_obs_on_the_readers(seed: int, rounds: int) -> None:
    case = Case(seed)
    assert order(case.fit("obs", rounds=rounds)).tolist() == direct(case, 1e-3, rounds)


@given(seed=seeds)
def test_what_stays_after_an_obs_update_is_the_refit_model(seed: int) -> None:
    case = Case(seed)
    names = np.random.default_rng(seed).permutation(12)
    out, stay = np.sort(names[:5]), np.sort(names[5:])
    P, G = without(
        *(torch.from_numpy(m) for m in (np.linalg.inv(case.C), case.G)),
        torch.from_numpy(out),
        torch.from_numpy(stay),
    )
    inverse = np.linalg.inv(case.C[np.ix_(stay, stay)])
    W = case.W[:, stay] + case.W[:, out] @ case.C[np.ix_(out, stay)] @ inverse
    assert np.allclose(P.numpy(), inverse, rtol=1e-6, atol=1e-9 * np.abs(inverse).max())
    assert np.allclose(G.numpy(), W.T @ W, rtol=1e-6, atol=1e-9 * np.abs(case.G).max())
    stale = case.W[:, stay].T @ case.W[:, stay]  # the control: readers that were not refit
    assert not np.allclose(G.numpy(), stale, rtol=1e-3)


def test_the_first_channel_that_obs_takes_is_the_cheapest_one() -> None:
    case = Case(7)
    last = order(case.fit("obs", ridge=1e-9, rounds=12))[-1]
    losses = [case.loss(np.delete(np.arange(12), j)) for j in range(12)]
    assert last == int(np.argmin(losses)) and max(losses) > 2 * min(losses)


def test_obs_beats_orders_that_do_not_know_who_can_stand_in() -> None:
    lost: dict[str, list[float]] = {
        name: [] for name in ("obs", "permute", "ridge_leverage", "identity")
    }
    for seed in range(20):
        case = Case(seed)
        for name, found in lost.items():
            found.append(case.loss(order(case.fit(name))[:6]))
    mean = {name: float(np.mean(found)) for name, found in lost.items()}
    assert mean["obs"] == min(mean.values()) and mean["identity"] == max(mean.values())


def test_more_rounds_than_channels_and_one_channel_are_served() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    assert survival(one, one, 4).tolist() == [0]
    eye = torch.eye(3, dtype=torch.float64)
    assert survival(eye, torch.diag(torch.tensor([2.0, 1.0, 3.0]).double()), 9).tolist() == [
        2,
        0,
        1,
    ]
    assert torch.equal(Pick(torch.tensor([[2, 0, 1]]), 3).matrix()[0][:, 0], eye[:, 2])


# The metric


@pytest.mark.parametrize("name", ["permute", "obs"])
def test_by_the_fisher_energies_are_nats_a_token(name: str) -> None:
    case = Case(5)
    basis = case.fit(name, metric="fisher")
    root = np.linalg.cholesky(case.F / 2).T  # ½ eᵀFe = ‖root e‖²
    kept = order(basis)
    if name == "obs":
        for k in (2, 6, 10):
            assert tails(basis)[k] == pytest.approx(case.loss(kept[:k], root), rel=1e-2)
    else:
        energy = np.diag(case.C) * np.diag(case.F) / 2
        assert np.allclose(basis.energy[0].numpy(), energy[kept])
    assert kept.tolist() != order(case.fit(name)).tolist()  # the control: readers weigh otherwise


def test_those_weighed_by_the_fisher_count_nats_and_no_others() -> None:
    names = [n for n in registry("rotate") if hasattr(find("rotate", n)(), "metric")]
    assert set(names) >= {"permute", "obs", "head_svd", "rope_pairs"}
    assert all(
        find("rotate", n)(metric="fisher").nats and not find("rotate", n)().nats for n in names
    )


def test_whitened_directions_by_the_fisher_lose_what_their_energies_say() -> None:
    case = Case(5)
    space = Space("vo.0", "vo", len(case.C), Group.INVERTIBLE)
    known = {
        ("vo.0", s): Moment(torch.from_numpy(m)[None], 1)
        for s, m in ((Statistic.WEIGHTED, case.C), (Statistic.FISHER, case.F))
    }
    basis = find("rotate", "head_svd")(metric="fisher").fit(space, Moments(known))
    A = basis.A.matrix()[0].numpy()
    for k in (2, 5):
        kept = A[:, :k] @ np.linalg.inv(A)[:k]  # what stays of xᵀ
        lost = np.eye(len(A)) - kept
        nats = np.trace(lost.T @ case.C @ lost @ case.F) / 2
        assert basis.energy[0, k:].sum().item() == pytest.approx(nats, rel=1e-6)
        assert basis.energy[0, k:].sum().item() != pytest.approx(2 * nats, rel=1e-6)  # the control


def test_the_fisher_is_refused_where_no_stream_is_written() -> None:
    from folders import model_of

    step = {"spaces": "qk", "rotate": {"permute": {"metric": "fisher"}}}
    recipe = Recipe.from_dict({"model": "m", "calibrate": {"data": "d"}, "steps": [step]})
    with pytest.raises(InputError, match="asks for the output's Fisher"):
        plan(recipe, model_of("opt").config)
    without_data = Recipe.from_dict(
        {"model": "m", "calibrate": {"data": "d"}, "steps": [step | {"spaces": "vo"}]}
    )
    assert plan(without_data, model_of("opt").config).fisher_points == ["x.0.1", "x.1.1"]


# The stream


def stream(seed: int, d: int = 10) -> tuple[Space, Moments, dict[Statistic, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    space = Space("x.0.0", "residual", d, Group.ORTHOGONAL)
    found = {}
    for statistic in (Statistic.RAW, Statistic.NORMED, Statistic.FISHER, Statistic.READERS):
        m = torch.randn(d, d, generator=g, dtype=torch.float64) * torch.rand(
            d, generator=g
        ).double().pow(2)
        found[statistic] = m @ m.mT
    return space, Moments({("x.0.0", s): Moment(m[None], 1) for s, m in found.items()}), found


@given(seed=seeds, tau=st.sampled_from([0.1, 1.0, 10.0]), of=st.sampled_from(["raw", "normed"]))
def test_output_aware_keeps_most_of_signal_and_output_together(
    seed: int, tau: float, of: str
) -> None:
    space, moments, found = stream(seed)
    basis = find("rotate", "output_aware")(tau=tau, of=of).fit(space, moments)
    C, H = found[Statistic(of)].numpy(), found[Statistic.FISHER].numpy()
    M = tau * C / np.trace(C) + H / np.trace(H) / tau
    assert np.allclose(np.linalg.eigvalsh(M)[::-1], basis.energy[0].numpy())
    A = basis.A.matrix()[0].numpy()
    assert np.allclose(A.T @ M @ A, np.diag(basis.energy[0].numpy()), atol=1e-12)
    scaled = Moments(
        {
            k: Moment(m.total * 7 if k[1] is Statistic.FISHER else m.total, 1)
            for k, m in moments.known.items()
        }
    )
    assert torch.allclose(
        find("rotate", "output_aware")(tau=tau, of=of).fit(space, scaled).energy, basis.energy
    )


def test_output_aware_is_pca_for_a_large_tau_and_is_not_for_a_small_one() -> None:
    space, moments, _ = stream(1)
    pca = find("rotate", "pca")().fit(space, moments).A.matrix()[0, :, :4]

    def apart(tau: float) -> float:
        A = find("rotate", "output_aware")(tau=tau).fit(space, moments).A.matrix()[0, :, :4]
        return (A @ A.mT - pca @ pca.mT).abs().max().item()

    assert apart(1e6) < 1e-6 and apart(0.1) > 0.1


@given(seed=seeds)
def test_reader_weighted_with_readers_refit_is_reduced_rank_regression(seed: int) -> None:
    space, moments, found = stream(seed)
    basis = find("rotate", "reader_weighted")(damping=1e-9).fit(space, moments)
    C, G = found[Statistic.NORMED].numpy(), found[Statistic.READERS].numpy()
    W = np.linalg.cholesky(G).T
    best = np.linalg.eigvalsh(W @ C @ W.T)[::-1]
    for k in (2, 5, 8):
        change = find("slice", "least_squares")(ridge=0.0).cut(space, basis, k, moments)
        left = np.eye(10) - (change.decode.matrix()[0] @ change.encode.matrix()[0].mT).numpy()
        lost = np.trace(left @ C @ left.T @ G)
        assert abs(lost - best[k:].sum()) <= 1e-5 * best.sum()
        assert abs(lost - basis.energy[0, k:].sum().item()) <= 1e-5 * best.sum()
    pca = find("rotate", "pca")(of="normed").fit(
        space, moments
    )  # the control: another orthogonal basis is worse
    change = find("slice", "least_squares")(ridge=0.0).cut(space, pca, 5, moments)
    left = np.eye(10) - (change.decode.matrix()[0] @ change.encode.matrix()[0].mT).numpy()
    assert np.trace(left @ C @ left.T @ G) > best[5:].sum() * (1 + 1e-6)


def test_energies_do_not_hang_on_how_many_columns_are_multiplied_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    g = torch.Generator().manual_seed(0)
    C, G = (m @ m.mT for m in torch.randn(2, 1, 12, 30, generator=g, dtype=torch.float64))
    order = torch.randperm(12, generator=g)[None]
    at_once = ordered(order, C.clone(), G.clone()).energy
    monkeypatch.setattr(_channels, "WIDE", 5)
    in_parts = ordered(order, C.clone(), G.clone()).energy
    assert torch.allclose(in_parts, at_once, rtol=1e-12, atol=0)
