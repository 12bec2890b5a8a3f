"""Joint methods: they see the model, give many spaces what they get at once, and are told of what cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import VOCABULARY, model_of

import invariance
from invariance import Basis, Change, Group, InputError, InvarianceError, Joint, Pick, Scene
from invariance.core.dense import Dense
from invariance.io.data import Tokens
from invariance.measure.losses import divergence
from invariance.method.interfaces import find
from invariance.model.canonical import canonicalize

IDS = torch.randint(1, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))
MODEL = model_of("llama", num_hidden_layers=1)
STREAM = ("x.0.0", "x.0.1", "x.1.0")


def scene(width: int = 24) -> Scene:
    """The whole stream of a tiny model, to be cut to a width."""
    model = model_of("llama", num_hidden_layers=1)
    layout = canonicalize(model, fold=True)
    moments = invariance.calibrate(MODEL, IDS, "residual", ["raw", "normed"], dtype="float32")
    pooled = {("x.0.0", k[1]): moments.known["x.0.0", k[1]] for k in moments.known}
    for (name, statistic), moment in moments.known.items():
        if name != "x.0.0":
            pooled["x.0.0", statistic] = pooled["x.0.0", statistic] + moment
    return Scene(
        model.requires_grad_(False),
        layout,
        {"x.0.0": layout.spaces["x.0.0"]},
        {"x.0.0": STREAM},
        {"x.0.0": width},
        Tokens.full(IDS),
        invariance.Moments(pooled, layout),
    )


def recipe(folder: Path, rotate: Any, spaces: str = "residual", **keys: Any) -> dict[str, Any]:
    np.save(folder / "t.npy", IDS.numpy())
    step = {"spaces": spaces, "rotate": rotate, "select": {"uniform": {"width": 24}}}
    calibrate = {"data": str(folder / "t.npy"), "dtype": "float32"}
    return {"model": "m", "calibrate": calibrate, "steps": [step]} | keys


def test_a_signal_that_passes_a_projector_is_a_model_that_is_cut() -> None:
    here = scene()
    Q = torch.linalg.qr(torch.randn(1, 32, 32, dtype=torch.float64))[0]
    cut = Change.rotation(Q).columns(torch.arange(24))
    small = invariance.apply(MODEL, dict.fromkeys(STREAM, cut))
    through = {"x.0.0": lambda x: cut.read(here.spaces["x.0.0"], x)}
    assert torch.allclose(here.logits(IDS, through), small(IDS).logits, atol=1e-4)
    assert torch.allclose(here.logits(IDS), MODEL(IDS).logits, atol=1e-4)
    assert not torch.allclose(here.logits(IDS), small(IDS).logits, atol=1e-2)  # the control
    kl = divergence(MODEL, small, Tokens.full(IDS)).kl.mean()
    with torch.no_grad():
        last = here.logits(IDS), here.logits(IDS, through)
    p, q = (x[:, :-1].log_softmax(-1) for x in last)
    assert (p.exp() * (p - q)).sum(-1).mean() == pytest.approx(kl.item(), rel=1e-3)


@pytest.mark.parametrize("name", ["x.0.1", "x.1.0", "mlp.0", "vo.0"])
def test_gradients_are_those_of_the_loss_by_what_readers_get(name: str) -> None:
    here = scene()
    (x, g), step = here.gradients(IDS, [name])[name], 1e-2
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    up, down = (here.loss(IDS, {name: lambda x, s=s: x + s * step * direction}) for s in (1, -1))
    slope = (up - down) / (2 * step)
    assert slope.item() == pytest.approx((g * direction).sum().item(), rel=0.05, abs=2e-3)


def test_a_learned_rotation_loses_less_than_where_it_began() -> None:
    here = scene()
    start, learned = (
        find("joint", "learned_rotation")(steps=n, learning_rate=0.02).fit(here)["x.0.0"]
        for n in (0, 40)
    )

    def kl(basis: Basis) -> float:
        cut = Change.rotation(basis.A).columns(torch.arange(24))
        return here.divergence(IDS, {"x.0.0": lambda x: cut.read(here.spaces["x.0.0"], x)}).item()

    assert kl(learned) < 0.9 * kl(start)
    assert here.spaces["x.0.0"].contains(learned.A)
    C = here.moments.second("x.0.0", "normed")[0]
    axes = torch.linalg.eigh(C)[1].flip(-1)[:, :24]  # the start is PCA's
    assert torch.linalg.matrix_norm(axes.mT @ start.A.matrix()[0, :, :24], 2) == pytest.approx(1)


def test_a_recipe_names_it_in_a_rotators_place(tmp_path: Path) -> None:
    asked = recipe(tmp_path, {"learned_rotation": {"steps": 3}})
    found = invariance.compression(MODEL, asked)
    assert found.model.config.hidden_size == 24 and found.certificate.passed
    assert found.report["recipe"]["steps"][0]["rotate"] == {"learned_rotation": {"steps": 3}}
    text = invariance.Recipe.from_dict(asked).to_yaml()
    assert "learned_rotation" in text and find("joint", "learned_rotation")
    by_hand = invariance.apply(
        MODEL,
        dict.fromkeys(STREAM, Change.rotation(found.bases["x.0.0"].A).columns(torch.arange(24))),
    )
    assert torch.allclose(by_hand(IDS).logits, found.model(IDS).logits, atol=1e-5)


def mask() -> type[Joint]:
    @dataclass(frozen=True)
    class FirstChannels(Joint, name="first_channels"):
        """The first channels, all spaces at once, told to the reader as a change: a baseline of no merit."""

        wrong: str = ""
        produces = Group.PERMUTATION
        needs_widths = True

        def fit(self, scene: Scene) -> Mapping[str, Any]:
            given: dict[str, Any] = {}
            for name, space in scene.spaces.items():
                E = Pick.first(space.copies, space.dim, scene.widths[name])
                given[name] = Change(
                    E, E.scaled(2 * torch.ones(E.index.shape, dtype=torch.float64))
                )
            return self.faulty(given)

        def faulty(self, given: dict[str, Any]) -> Any:
            first = next(iter(given))
            ones, eye = torch.ones(1, 64, dtype=torch.float64), torch.eye(64, dtype=torch.float64)
            wrong = {
                "list": [given],
                "nothing": {},
                "more": given | {"x.0.0": given[first]},
                "width": {first: Change.empty(MODEL_SPACES[first], 3)},
                "mixes": {first: Basis(torch.linalg.qr(eye + 1)[0][None], ones)},
                "nan": {first: Basis(torch.nan * eye[None], ones)},
                "energy": {first: Basis(eye[None], ones[:, :3])},
                "half": {first: "half"},
                "skewed": {first: Change(Dense(torch.rand(1, 64, 24, dtype=torch.float64)), ONE)},
            }
            return wrong.get(self.wrong, given)

    return FirstChannels


MODEL_SPACES = invariance.inspect_model(MODEL).spaces
ONE = Dense(torch.rand(1, 64, 24, dtype=torch.float64))
FAULTS = {
    "list": "gave list",
    "nothing": "space 'mlp.0': gave it nothing",
    "more": "gave space 'x.0.0' something",
    "width": r"gave an E of shape \(1, 64, 3\)",
    "mixes": "outside the group",
    "nan": "NaN",
    "energy": "energies of shape",
    "half": "gave str",
    "skewed": "gave an E outside the group",
}


def test_a_joint_method_may_give_the_change_itself(tmp_path: Path) -> None:
    mask()
    small = invariance.compress(MODEL, recipe(tmp_path, "first_channels", "mlp"))
    down = MODEL.model.layers[0].mlp.down_proj.weight
    assert torch.equal(small.model.layers[0].mlp.down_proj.weight, 2 * down[:, :24])


@pytest.mark.parametrize("wrong", FAULTS)
def test_rubbish_is_refused_with_the_methods_name(wrong: str, tmp_path: Path) -> None:
    mask()
    asked = recipe(tmp_path, {"first_channels": {"wrong": wrong}}, "mlp")
    with pytest.raises(InvarianceError, match=f"joint method 'first_channels'.*{FAULTS[wrong]}"):
        invariance.compress(MODEL, asked)


def test_what_a_joint_method_cannot_serve_is_told_before_anything_runs(tmp_path: Path) -> None:
    good = recipe(tmp_path, "learned_rotation")
    select = [good["steps"][0] | {"select": "global_energy"}]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"order": "sequential"}, "sees the dense model"),
        ({"calibrate": None}, "Add `calibrate"),
        ({"steps": select, "budget": {"parameters": 0.9}}, "waits for its energies"),
        ({"steps": [good["steps"][0] | {"spaces": "mlp"}]}, "admits"),
        ({"steps": [good["steps"][0] | {"rotate": {"learned_rotation": {"steps": -1}}}]}, "steps"),
    ]
    for keys, message in bad:
        with pytest.raises(InputError, match=message):
            invariance.compress(MODEL, good | keys)
