"""What a method returns is checked before it is believed, and the method is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from folders import invoke, model_of, save_model, save_tokens
from torch import Tensor

from invariance.core.change import Basis, Change
from invariance.core.errors import InputError, InvarianceError
from invariance.core.group import Group
from invariance.core.space import Space
from invariance.method.checked import cut, fitted
from invariance.method.interfaces import Rotator, Selector, Slicer
from invariance.run.compress import compress

SPACES = {
    g: Space(f"space of {g.value}", "residual", 8, g, rotary=4 if g is Group.ROTARY else 0)
    for g in Group
}
MLP = SPACES[Group.MONOMIAL]


def whole(space: Space, seed: int = 0) -> Basis:
    return Basis(space.element(seed), torch.arange(8.0, 0, -1).double().unsqueeze(0))


def energies(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


BASES: dict[str, tuple[Callable[[Basis], Any], str]] = {
    "nothing": (lambda b: None, "NoneType, and not a Basis"),
    "NaN energies": (lambda b: Basis(b.A, b.energy * torch.nan), "NaN or infinite"),
    "negative energies": (lambda b: Basis(b.A, b.energy - 5), "an energy of -4"),
    "too few energies": (
        lambda b: Basis(b.A, b.energy[:, :3]),
        r"shape \(1, 3\); there must be \(1, 8\)",
    ),
    "a NaN basis": (lambda b: Basis(b.A.matrix() * torch.nan, b.energy), "basis with NaN"),
    "a smaller basis": (lambda b: Basis(b.A.matrix()[:, :7, :7], b.energy), "shape"),
    "outside the group": (lambda b: Basis(b.A.matrix() + 1, b.energy), "outside the group"),
    "beside what it says": (
        lambda b: Basis(b.A.matrix() * 2, b.energy),
        "says that it gives 'permutation', and gave another",
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_a_basis_that_cannot_be_is_the_rotators_fault(case: str) -> None:
    spoil, says = BASES[case]

    class Faulty(Rotator):
        name = "faulty"
        produces = Group.PERMUTATION if "says" in says else Group.MONOMIAL

        def fit(self, space: Space, moments: Any) -> Basis:
            made: Basis = spoil(whole(space))
            return made

    with pytest.raises(InvarianceError, match=f"rotator 'faulty'.*{says}.*fault of the method"):
        fitted(Faulty(), MLP, None)  # type: ignore[arg-type]


def kept(space: Space, k: int, seed: int = 0) -> Change:
    """An honest slice: the first columns of an element."""
    return Change.rotation(space.element(seed)).columns(space.kept(k))


CHANGES: dict[str, tuple[Group, Callable[[Tensor, Tensor], Any], str]] = {
    "nothing": (Group.MONOMIAL, lambda E, D: None, "not a Change"),
    "a D of NaN": (Group.MONOMIAL, lambda E, D: Change(E, D * torch.nan), "D with NaN"),
    "an E of NaN": (Group.INVERTIBLE, lambda E, D: Change(E * torch.nan, D), "E with NaN"),
    "a narrower one": (Group.MONOMIAL, lambda E, D: Change(E[..., :4], D), "E of shape"),
    "another D": (Group.MONOMIAL, lambda E, D: Change(E, D[..., :4]), "D of shape"),
    "an offset of NaN": (
        Group.INVERTIBLE,
        lambda E, D: Change(E, D, torch.full((1, 8), torch.nan, dtype=torch.float64)),
        "offset that is not finite",
    ),
    "mixed channels": (Group.MONOMIAL, lambda E, D: Change(E + 1, D), "mixes several coordinates"),
    "a channel twice": (
        Group.MONOMIAL,
        lambda E, D: Change(E[..., [0, 0, 1, 2, 3, 4]], D),
        "takes a coordinate twice",
    ),
    "scaled where it may not be": (
        Group.PERMUTATION,
        lambda E, D: Change(2 * E, D),
        "scales must be 1",
    ),
    "turned round under ReLU": (
        Group.POSITIVE_MONOMIAL,
        lambda E, D: Change(-E, D),
        "scales must be above 0",
    ),
    "stretched": (Group.ORTHOGONAL, lambda E, D: Change(2 * E, D), "no orthonormal ones"),
    "pairs apart": (Group.ROTARY, lambda E, D: Change(E.abs() + 1, D), "pair"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_that_cannot_be_is_the_slicers_fault(case: str) -> None:
    group, spoil, says = CHANGES[case]
    space = SPACES[group]

    class Faulty(Slicer):
        name = "faulty"

        def cut(self, space: Space, basis: Basis, k: int, moments: Any) -> Change:
            honest = kept(space, k)
            made: Change = spoil(honest.encode.matrix(), honest.decode.matrix())
            return made

    with pytest.raises(InvarianceError, match=f"slicer 'faulty'.*{says}.*fault of the method"):
        cut(Faulty(), space, whole(space), 6, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("group", Group)
@pytest.mark.parametrize("seed", range(3))
def test_honest_methods_pass(group: Group, seed: int) -> None:
    space = SPACES[group]

    class Honest(Rotator):
        name = "honest"
        produces = group

        def fit(self, space: Space, moments: Any) -> Basis:
            return whole(space, seed)

    class Cuts(Slicer):
        name = "cuts"

        def cut(self, space: Space, basis: Basis, k: int, moments: Any) -> Change:
            return kept(space, k, seed)

    basis = fitted(Honest(), space, None)  # type: ignore[arg-type]
    assert cut(Cuts(), space, basis, 6, None).width == 6  # type: ignore[arg-type]


@dataclass(frozen=True)
class Odd(Selector, name="odd"):
    """Whatever the recipe says, 41."""

    def allocate(self, spectra: Any, cost: Any, budget: Any) -> Any:
        return dict.fromkeys(spectra, 41)


def test_widths_that_break_what_the_recipe_asks_for_are_refused() -> None:
    step = {"spaces": "mlp", "select": Odd(), "widths": {"multiple_of": 8}}
    with pytest.raises(
        InputError, match=r"selector 'odd'.* the width 41, which .* 40 is the nearest"
    ):
        compress(model_of("llama"), {"model": "m", "steps": [step]})
    assert replace(Odd()) == Odd()


# --- A10 and D: what else a run must not do in silence.


def test_skipping_all_there_is_is_refused(tmp_path: Any) -> None:
    save_model(tmp_path / "model")
    save_tokens(tmp_path / "tokens.npy")
    (tmp_path / "r.yaml").write_text(
        f"model: {tmp_path}/model\ncalibrate: {{data: {tmp_path}/tokens.npy, skip: 99}}\n"
        "steps: [{spaces: residual, rotate: pca, select: {uniform: {width: 24}}}]\n"
    )
    status, _, err = invoke("run", tmp_path / "r.yaml", "--output", tmp_path / "out")
    assert status == 2 and "skip: 99 leaves nothing to measure" in " ".join(err.split())


@pytest.mark.parametrize("segments", ["global", "block", "stage"])
def test_the_identity_may_be_cut_in_segments(segments: str) -> None:
    step = {"spaces": "residual", "segments": segments, "rotate": "identity"}
    step |= {"select": {"uniform": {"width": 24}}}
    made = compress(model_of("llama", tie_word_embeddings=False), {"model": "m", "steps": [step]})
    assert made.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2).shape == (1, 5)
