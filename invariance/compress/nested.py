"""Nested members: narrower models in one model's weights, each the first directions of every space."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig, PreTrainedModel

from ..core.change import Change
from ..core.errors import InputError
from ..core.space import Space
from ..io.checkpoint import wrap
from ..io.export import stock
from ..model.canonical import layout_of
from ..model.copies import double_copy
from ..model.labels import label
from ..model.layout import Layout
from ..model.reparametrize import reparametrize
from .demand import Widths

Members = Mapping[
    str, Widths
]  # share → widths of the spaces that are narrower than the model has them


def members(now: Layout, widest: float, narrower: Mapping[float, Widths]) -> Members:
    """The members of a sliced model by their shares, the model itself first; ``now`` is its layout."""
    return {
        repr(share): {n: k for n, k in widths.items() if n in now.spaces and k < now.spaces[n].dim}
        for share, widths in {widest: {}, **narrower}.items()
    }


def first(layout: Layout, widths: Widths) -> dict[str, Change]:
    """The changes that keep the first directions of spaces and nothing else.

    Cutting a basis to k directions and then to the first j of them is cutting it to j: E and D are the first columns of
    what they were, shortcuts D_sᵀE_t the first rows and columns, and norms go on dividing by the original width.
    """
    made: dict[tuple[int, int, int, int], Change] = {}
    found = {}
    for name, k in widths.items():
        space = layout.spaces[name]
        alike = (space.dim, space.copies, space.rotary, k)
        found[name] = made.setdefault(alike, _first(space, k))
    return found


def _first(space: Space, k: int) -> Change:
    if not k:
        return Change.empty(space, 0)
    return Change.choice(space, space.kept(k))


def extract(model: PreTrainedModel, share: float) -> tuple[PreTrainedModel, str]:
    """A member as a model of its own, in float64, and why it is no stock one; what it came from is left as it is.

    Raises InputError, with the members that there are, for one that there is not.
    """
    form = model.config.form
    widths = chosen(form.nested, share)
    twin = double_copy(model)
    now = label(twin)
    reparametrize(twin, now, first(now, widths))
    original = model.config.dense()
    layout = layout_of(original, fold=form.folded, tie=form.tie, split=form.split)
    made, why = stock(twin, layout, layout_of(original), original)
    return (made if made is not None else wrap(twin, layout, original, form.tie)), why


def chosen(nested: Members, share: float) -> Widths:
    """The widths of a member. Raises InputError, with the members that there are, for one that there is not."""
    found = [widths for name, widths in nested.items() if float(name) == share]
    if not found:
        known = ", ".join(f"{each:g}" for each in sorted(map(float, nested), reverse=True))
        raise InputError(f"no member has the share {share:g}. There are {known}.")
    return found[0]


def family(config: PretrainedConfig, where: str) -> Members:
    """The members that a checkpoint holds. Raises InputError where it is one model alone."""
    nested: Members = config.form.nested if config.model_type == "invariance" else {}
    if not nested:
        raise InputError(
            f"{where}: holds one model, no nested ones. A recipe with `budget: {{parameters: 0.9}}` and `nested: [0.8]` "
            "makes a checkpoint of several; `recipes/family.yaml` is one."
        )
    return nested
