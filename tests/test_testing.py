"""The kit for packages of one's own: honest methods and models pass, and every fault is told with a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import VOCABULARY, model_of, save_model
from torch import Tensor

import invariance
from invariance import Basis, Change, Group, InputError, Joint, Pick, Rotator, Selector, Slicer
from invariance.method.interfaces import Method
from invariance.testing import check_method, check_model
from invariance.testing.methods import _made

F64 = torch.float64


@pytest.mark.parametrize(
    "name, families",
    [("pca", ("llama",)), ("permute", ("opt",)), ("uniform", ()), ("least_squares", ("llama",))],
)
def test_methods_that_ship_pass(name: str, families: tuple[str, ...]) -> None:
    check_method(name, families=families)


def test_a_joint_method_that_ships_passes() -> None:
    check_method("learned_rotation", options={"steps": 2})


def _rotator(fault: str) -> type[Method]:
    @dataclass(frozen=True)
    class Faulty(Rotator, name=f"faulty {fault}"):
        """Channels by what their signal carries, with one fault."""

        produces = Group.PERMUTATION
        kinds = frozenset() if fault == "idle" else frozenset({"mlp"})
        needs = frozenset({"mean": {invariance.Statistic.MEAN}}.get(fault, set())) | (
            frozenset() if fault == "unsaid" else frozenset({invariance.Statistic.RAW})
        )

        def fit(self, space: Any, moments: Any) -> Any:
            energy, order = moments.diagonal(space).sort(-1, descending=True)
            A = Pick(order, space.dim).matrix()
            if fault == "random":
                order = torch.randperm(space.dim).expand_as(order)
                A, energy = Pick(order, space.dim).matrix(), torch.ones_like(energy)
            if fault == "graph":
                energy = energy.requires_grad_()
            faults = {
                "rises": Basis(A.flip(-1), energy.flip(-1)),
                "negative": Basis(A, energy - energy.mean()),
                "group": Basis(
                    A * torch.tensor([-1.0, *[1.0] * (space.dim - 1)], dtype=F64), energy
                ),
                "shape": Basis(A[..., :-1], energy),
                "nan": Basis(A * torch.nan, energy),
                "none": None,
            }
            return faults.get(fault, Basis(A, energy))

    return Faulty


ROTATORS = {
    "idle": "serves no space",
    "unsaid": "`needs` does not name",
    "mean": "names 'mean' in `needs` and does not read it",
    "random": "another basis the second time",
    "graph": "requires gradients",
    "rises": "energies that rise",
    "negative": "below 0",
    "group": "gave another basis",
    "shape": "it must be",
    "nan": "NaN",
    "none": "gave NoneType",
}


@pytest.mark.parametrize("fault", ROTATORS)
def test_a_faulty_rotator_is_told_of_by_name(fault: str) -> None:
    with pytest.raises(AssertionError, match=f"'faulty {fault}'.*{ROTATORS[fault]}"):
        check_method(_rotator(fault), families=["llama"])


def test_an_honest_rotator_of_ones_own_passes() -> None:
    check_method(_rotator(""), families=["llama"])


def _slicer(fault: str) -> type[Method]:
    @dataclass(frozen=True)
    class Faulty(Slicer, name=f"faulty slice {fault}"):
        """Keeps the first directions, with one fault."""

        kinds = frozenset({"mlp"})
        prefix = True

        def cut(self, space: Any, basis: Any, k: int, moments: Any) -> Any:
            cut = Change.rotation(basis.A).columns(torch.arange(k))
            if fault == "scaled":
                return Change(cut.encode, cut.decode.scaled(torch.full((1, k), 0.9, dtype=F64)))
            if fault == "prefix" and k < space.dim:
                return Change(cut.encode, cut.decode.scaled(torch.full((1, k), 1.1, dtype=F64)))
            if fault == "wide":
                return Change.rotation(basis.A)
            return cut

    return Faulty


SLICERS = {"scaled": "moves the logits", "prefix": "says `prefix`", "wide": "it must be"}


@pytest.mark.parametrize("fault", SLICERS)
def test_a_faulty_slicer_is_told_of_by_name(fault: str) -> None:
    with pytest.raises(AssertionError, match=f"'faulty slice {fault}'.*{SLICERS[fault]}"):
        check_method(_slicer(fault), families=["llama"])


def _selector(fault: str) -> type[Method]:
    @dataclass(frozen=True)
    class Faulty(Selector, name=f"faulty select {fault}"):
        """All spaces alike until the budget is met, with one fault."""

        needs_budget = True

        def allocate(self, spectra: Any, cost: Any, budget: Any) -> Any:
            for t in range(101):
                share = 0.0 if fault == "greedy" else 1 - t / 100
                widths = {s: cost.rounded(s, share * s.dim) for s in spectra}
                if fault == "spends" or cost(widths) <= budget:
                    break
            if fault == "odd":
                widths = {s: k + 100 for s, k in widths.items()}
            if fault == "forgets":
                widths.popitem()
            return widths

    return Faulty


SELECTORS = {
    "greedy": "cuts where nothing must go",
    "spends": "spends",
    "odd": "not in `cost.widths`",
    "forgets": "other spaces",
}


@pytest.mark.parametrize("fault", SELECTORS)
def test_a_faulty_selector_is_told_of_by_name(fault: str) -> None:
    with pytest.raises(AssertionError, match=f"'faulty select {fault}'.*{SELECTORS[fault]}"):
        check_method(_selector(fault))


def test_a_joint_method_that_gives_rubbish_is_told_of_by_name() -> None:
    @dataclass(frozen=True)
    class Rubbish(Joint, name="rubbish"):
        """Numbers that are no basis of anything."""

        produces = Group.ORTHOGONAL
        kinds = frozenset({"residual"})

        def fit(self, scene: Any) -> Mapping[str, Basis]:
            return {
                n: Basis(torch.rand(1, 32, 32, dtype=F64), torch.ones(1, 32)) for n in scene.spaces
            }

    with pytest.raises(AssertionError, match=r"joint method 'rubbish'.*outside the group"):
        check_method(Rubbish)


def test_a_method_that_says_nothing_of_itself_is_told_of() -> None:
    @dataclass(frozen=True)
    class Silent(Rotator, name="silent"):
        produces = Group.IDENTITY

        def fit(self, space: Any, moments: Any) -> Basis:
            raise NotImplementedError

    @dataclass
    class Loose(Selector, name="loose"):
        """All spaces whole, a baseline that anybody may change."""

        widths: list[int] = field(default_factory=list)

        def allocate(self, spectra: Any, cost: Any, budget: Any) -> Any:
            return cost.whole

    with pytest.raises(AssertionError, match="no docstring"):
        check_method(Silent)
    with pytest.raises(AssertionError, match="no frozen dataclass"):
        check_method(Loose)
    with pytest.raises(AssertionError, match="no method is called 'pcaa'"):
        check_method("pcaa")
    assert _made("pca", {"of": "normed"}) == _made(type(_made("pca", {})), {"of": "normed"})


def test_models_pass_dense_and_sliced(tmp_path: Path) -> None:
    check_model(save_model(tmp_path / "m", "opt"))
    model = model_of("llama")
    layout = invariance.inspect_model(model)
    own = {p: layout.spaces[p].element(n) for n, p in enumerate(layout.points)}
    check_model(invariance.rotate(model, own))  # with shortcuts, in a form of its own


def test_a_model_with_a_fault_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    forward = type(model).forward

    def drifting(self: Any, *args: Any, past_key_values: Any = None, **keys: Any) -> Any:
        out = forward(self, *args, past_key_values=past_key_values, **keys)
        if past_key_values is not None:
            out.logits = out.logits + 0.1
        return out

    monkeypatch.setattr(type(model), "forward", drifting)
    with pytest.raises(AssertionError, match="with a cache its logits differ"):
        check_model(model)
    with pytest.raises(InputError, match="no model of PyTorch"):
        check_model(Tensor(VOCABULARY))  # type: ignore[arg-type]
