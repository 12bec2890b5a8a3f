"""What researchers give: models, names of spaces, tokens, bases, each checked once and told in one message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..calibrate.statistic import Statistic
from ..core.change import Basis, Change
from ..core.dense import as_operator
from ..core.errors import InputError, did_you_mean
from ..core.group import Group
from ..core.operator import Operator
from ..core.space import Space
from ..io.checkpoint import layout_of_config
from ..io.data import Amount, Tokens, load_tokens
from ..io.ties import note_ties
from ..io.tokens import check_ids
from ..method.interfaces import Method
from ..model.entry import check_model
from ..model.families import check_dense, check_positions, declared
from ..model.layout import Layout
from ..recipe.calibrate import Calibrate
from ..recipe.complaints import validate
from ..recipe.yaml_text import located

Data = str | Path | Tensor | np.ndarray | Tokens | Mapping[str, Any]
"""Token ids (B sequences of T, integers), a data set by its name or file, or as a recipe writes it: ``{data: ..., tokens:
512}``. Text needs a tokenizer."""
Spaces = str | Iterable[str] | None
"""Kinds (``residual``), names (``mlp.3``) or patterns (``mlp.*``)."""
Bases = Mapping[str, Basis | Operator | Tensor]
"""Space → basis: of shape (copies, dim, dim), float64; one object for spaces that share it."""
ONLY = {Statistic.NORMED: "residual", Statistic.QUERIES: "qk", Statistic.TAYLOR: "qk"}


def checked_model(model: object) -> PreTrainedModel:
    dense = check_model(model)
    note_ties(dense)
    return dense


def listed(words: str | Iterable[str]) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def chosen(layout: Layout, spaces: str | Iterable[str]) -> list[str]:
    """The names of spaces that patterns mean, each of them something."""
    patterns = listed(spaces)
    for pattern in patterns:
        if not isinstance(pattern, str) or not layout.select([pattern]):
            unknown(layout, pattern)
    return layout.select(patterns)


def unknown(layout: Layout, name: object) -> NoReturn:
    known = {*layout.spaces, *(space.kind.value for space in layout.spaces.values())}
    raise InputError(
        f"no space of this model is called '{name}'{did_you_mean(str(name), known)}. `inspect_model(model).spaces` has "
        "all of them."
    )


def word(what: str, given: object, known: tuple[str, ...]) -> Any:
    if given not in known:
        raise InputError(f"{what}: {given!r} is not known{did_you_mean(str(given), known)}")
    return given


def statistics_of(asked: Any) -> frozenset[Statistic]:
    if isinstance(asked, Method):
        return asked.needs
    each = [asked] if isinstance(asked, str | Statistic) else list(asked)
    known = [s.value for s in Statistic if s is not Statistic.COSINE]
    for one in each:
        word("statistics", one.value if isinstance(one, Statistic) else one, tuple(known))
    return frozenset(Statistic(one) for one in each)


def wanted_of(
    layout: Layout, names: list[str], statistics: frozenset[Statistic]
) -> dict[str, frozenset[Statistic]]:
    """What is measured of each space. Raises InputError for a statistic that none of them has."""

    def has(space: Space, statistic: Statistic) -> bool:
        if statistic is Statistic.FISHER:
            return bool(layout.written_behind(space.name))
        return ONLY.get(statistic, space.kind) == space.kind

    for statistic in statistics:
        if not any(has(layout.spaces[n], statistic) for n in names):
            raise InputError(
                f"statistics: none of these spaces has '{statistic.value}'. Name "
                f"{ONLY.get(statistic, 'residual, mlp or vo')} spaces, or leave it out."
            )
    spaces = [layout.spaces[n] for n in names]
    return {
        space.name: frozenset(s.on(space) for s in statistics if has(space, s)) for space in spaces
    }


def tokens_of(data: Data, config: PretrainedConfig, tokenizer: Any) -> Tokens:
    """Windows of token ids, checked against the model."""
    text = config.get_text_config()
    if isinstance(data, Tokens):
        found = data
    elif isinstance(data, Tensor | np.ndarray):
        ids = data.numpy(force=True) if isinstance(data, Tensor) else data
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or not prod(ids.shape):
            raise InputError(
                f"data: got {ids.dtype} of shape {tuple(ids.shape)}. Give token ids: integers of shape (sequences, tokens)."
            )
        check_ids(ids, text.vocab_size, "data")
        found = Tokens.full(ids)
    else:
        spec = _spec(data if isinstance(data, Mapping) else {"data": str(data)})
        found = load_tokens(
            spec.data,
            tokenizer,
            vocab_size=text.vocab_size,
            split=spec.split,
            amount=Amount(spec.sequences, spec.tokens),
        )
    if declared(text):
        check_positions(text, found.ids.shape[1], "data")
    return found


def batch_of(data: Data) -> int:
    """How many sequences pass at a time."""
    if isinstance(data, Mapping):
        return _spec(data).batch
    return int(Calibrate.model_fields["batch"].default)


def _spec(asked: Mapping[str, Any]) -> Calibrate:
    """What a recipe's `calibrate` takes. Raises InputError."""
    return validate(Calibrate, located(dict(asked), "data"))


def folded(model: PreTrainedModel, names: Iterable[str], tie: str) -> Layout:
    """The layout that named spaces are found in: edges split where they are named, the stream ready to be turned."""
    word("tie", tie, ("keep", "untie"))
    config = checked_model(model).config
    check_dense(config)
    dense = layout_of_config(config)
    layout = layout_of_config(config, fold=True, tie=tie, split=dense.splits(names))
    for name in names:
        if name not in layout.spaces:
            unknown(layout, name)
    return layout


def folds(layout: Layout, names: Iterable[str]) -> bool:
    """Whether norms must lose their gains: only where the stream changes."""
    return any(layout.spaces[name].kind == "residual" for name in names)


def rotations(layout: Layout, bases: Bases) -> dict[str, Change]:
    """Bases as changes, each checked against its space; one object where the basis is one object."""
    made: dict[int, Change] = {}
    for name, basis in bases.items():
        if id(basis) not in made:
            made[id(basis)] = Change.rotation(operator(layout.spaces[name], basis))
        elif made[id(basis)].encode.shape[:2] != (
            layout.spaces[name].copies,
            layout.spaces[name].dim,
        ):
            operator(layout.spaces[name], basis)
    return {name: made[id(basis)] for name, basis in bases.items()}


def operator(space: Space, basis: Any) -> Operator:
    given = basis.A if isinstance(basis, Basis) else basis
    if not isinstance(given, Operator | Tensor):
        raise InputError(
            f"space '{space.name}': got {type(given).__name__}. Give a Basis, an Operator or a tensor."
        )
    if isinstance(given, Tensor) and given.ndim == 2:
        given = given[None]
    shape = (space.copies, space.dim, space.dim)
    if tuple(given.shape) != shape:
        raise InputError(
            f"space '{space.name}': got a basis of shape {tuple(given.shape)}, where {shape} would fit: (copies, dim, dim)."
        )
    if isinstance(given, Tensor) and given.dtype != torch.float64:
        raise InputError(
            f"space '{space.name}': got a basis in {given.dtype}. Make it in float64: rounding would not be exact."
        )
    A = as_operator(given)
    check_numbers(space.name, A, "basis")
    if not space.contains(A):
        raise InputError(
            f"space '{space.name}': the basis is outside the group '{space.group.value}', so it would not be exact, because "
            f"{space.why}.{_off(space, A)}"
        )
    return A


def _off(space: Space, A: Operator) -> str:
    if space.group is not Group.ORTHOGONAL:
        return ""
    X = A.matrix()
    off = (X.mT @ X - torch.eye(space.dim, dtype=X.dtype)).abs().max()
    return f" AᵀA differs from the identity by {off:.1e}."


def check_numbers(name: str, X: Operator, part: str) -> None:
    for tensor in X.tensors:
        if tensor.is_floating_point() and tensor.dtype != torch.float64:
            raise InputError(
                f"space '{name}': {part} is in {tensor.dtype}. Make it in float64, in which weights are changed."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"space '{name}': {part} holds NaN or infinite numbers.")
