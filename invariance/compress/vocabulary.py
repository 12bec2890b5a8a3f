"""The rows of rare tokens as two factors: those that change their logits the least on what the final norm gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..core.progress import Progress, quiet
from ..io.tokens import Tokens
from ..model.architecture import Architecture
from ..model.copies import copy_in
from ..model.layout import Layout
from ..model.vocabulary import Factors, Shape, install, is_tied
from ..recipe.recipe import Recipe

RIDGE = 0.01
"""How much every direction weighs, beside the mean of the final signal's energies: rows are looked up too. On other text
of SmolLM2's, 0.001 to 0.03 differ by less than 0.1 % of perplexity; 0.1 and 1 lose."""
BATCH = 4  # windows that pass the model side by side
WINDOWS = 64  # at most, spread over the calibration data: d² numbers want no more


def check_vocabulary(recipe: Recipe, layout: Layout, widths: Mapping[str, int]) -> None:
    """Raises InputError where the vocabulary cannot be stored as asked, of a stream of some widths."""
    asked = recipe.vocabulary
    if asked is None:
        return
    rows = layout.shapes[f"{layout.architecture.embed[0]}.weight"][0]
    width = min(layout.width(point, widths) for point in (layout.points[0], layout.points[-1]))
    if asked.common >= rows:
        raise InputError(
            f"{recipe.where('vocabulary', 'common')}: all {rows} tokens would keep rows of their own. Give fewer."
        )
    shape = Shape(asked.common, asked.rank)
    if shape.numbers(rows, width) >= rows * width:
        most = (rows - asked.common) * width // (rows - asked.common + width)
        raise InputError(
            f"{recipe.where('vocabulary', 'rank')}: two factors of rank {asked.rank} store no less than the "
            f"{rows - asked.common} rows of {width}. {f'Give a rank of at most {most}' if most else 'Give a smaller `common`'}."
        )


def spared(layout: Layout, shape: Shape, width: int) -> int:
    """How many numbers a table, or a head, of this width stores less."""
    rows = layout.shapes[f"{layout.architecture.embed[0]}.weight"][0]
    return rows * width - shape.numbers(rows, width)


@torch.no_grad()
def factor_vocabulary(
    model: PreTrainedModel,
    arch: Architecture,
    shape: Shape,
    tokens: Tokens,
    progress: Progress = quiet,
) -> float:
    """Factor the rows of a model's rare tokens, in place. Returns the share of their energy that is lost, as the head sees
    them: Σ‖(W − Ŵ) C^½‖² / Σ‖W C^½‖², with C the second moment of the signal behind the final norm.

    A head of its own is factored so; its table then by plain singular values.
    """
    table, head = model.get_submodule(arch.embed[0]), model.get_submodule(arch.head)
    seen = _second_moment(model, tokens, progress)
    each = seen.diagonal().mean() * torch.eye(len(seen)).to(seen)
    read = seen + RIDGE * each
    tied = is_tied(table, head)
    own, lost = factors_of(table.get_parameter("weight"), read if tied else each, shape)
    heads = None
    if not tied:
        heads, lost = factors_of(head.get_parameter("weight"), read, shape)
    install(model, arch, own, heads)
    return lost


def factors_of(
    W: Float[Tensor, "V d"], metric: Float64[Tensor, "d d"], shape: Shape
) -> tuple[Factors, float]:
    """The first rows, and the factors (V − n, r), (r, d) of the others that lose the least in a metric: their truncated
    singular value decomposition behind its root (Eckart and Young), in the dtype of W. And the share of energy lost."""
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(values[-1] * 1e-12).sqrt()
    A = (W[shape.common :].double() @ vectors) * root
    energies, V = torch.linalg.eigh(A.mT @ A)
    kept = V[:, -shape.rank :].flip(1)
    basis = (kept.mT / root) @ vectors.mT
    energies = energies.clamp_min(0)
    lost = energies[: -shape.rank].sum() / energies.sum()
    return (W[: shape.common].clone(), (A @ kept).to(W), basis.to(W)), float(lost)


def _second_moment(
    model: PreTrainedModel, tokens: Tokens, progress: Progress
) -> Float64[Tensor, "d d"]:
    """Of the signal behind the final norm, on windows spread over the tokens."""
    runner = copy_in(torch.float32, model).base_model
    step = -(-len(tokens.ids) // WINDOWS)
    ids, masks = (t[::step].to(model.device) for t in (tokens.ids, tokens.mask))
    batches = list(zip(ids.split(BATCH), masks.split(BATCH), strict=True))
    total: Tensor | None = None
    for some, mask in progress(batches, "rare tokens", len(batches)):
        stream = runner(input_ids=some, attention_mask=mask, use_cache=False).last_hidden_state
        h = stream[mask].double()
        total = h.mT @ h if total is None else total + h.mT @ h
    assert total is not None
    return total / masks.sum()
