"""The canonical form of a model, by the architecture that is read of its config."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PretrainedConfig, PreTrainedModel

from .families import architecture
from .folding import canonical
from .layout import Layout


def canonicalize(
    model: PreTrainedModel, *, fold: bool, tie: str = "untie", split: Collection[str] = ()
) -> Layout:
    """Rewrite a family's model in place, without changing its function, and return its layout.

    ``fold=False`` rewrites the blocks alone: enough for changes inside MLPs and heads, and the model keeps its norms,
    its tied head and its stock form. ``fold=True`` also makes the residual stream's group orthogonal: norms lose
    their gains and biases, LayerNorm loses its centring (its writers are centred instead). A tied head must then be
    separated from the table (``tie="untie"``) or read it through a d×d matrix diag(γ) (``tie="keep"``). ``split`` names
    the matrices (``edge.3.down``) that become two factors with a space between them.

    Raises InputError for a model that the grammar does not speak of, a tie that cannot be kept, or an edge that is not
    there.
    """
    return canonical(model, architecture(model.config), fold=fold, tie=tie, split=split)


def layout_of(
    config: PretrainedConfig, *, fold: bool = False, tie: str = "untie", split: Collection[str] = ()
) -> Layout:
    """The layout of a config's canonical model, without reading or making a weight. Raises InputError."""
    arch = architecture(config)
    return canonical(arch.skeleton(config), arch, fold=fold, tie=tie, split=split)
