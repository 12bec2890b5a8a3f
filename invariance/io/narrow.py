"""A family's model made as narrow as a checkpoint says that it is, with no numbers in it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.change import Change
from ..core.errors import InputError
from ..core.space import Space, columns
from ..model.canonical import canonicalize
from ..model.families import architecture
from ..model.labels import label
from ..model.layout import Layout
from ..model.modules import Stage
from ..model.reparametrize import attention_of, reparametrize
from ..model.vocabulary import Shape, install_blank, tie
from .form import AGAIN, TYPE, Form


@torch.no_grad()
def narrow(model: PreTrainedModel, form: Form, where: str) -> None:
    """Restructure a model that was built of its dense config, and give it the shapes of ``form``. Raises InputError.

    Its parameters are on the meta device and stay there.
    """
    arch = architecture(model.config)
    if model.config.tie_word_embeddings:  # on the meta device transformers leaves the two apart
        tie(model, arch)
    training = model.training
    try:
        layout = canonicalize(model, fold=form.folded, tie=form.tie, split=form.split)
    except InputError as e:
        raise _damaged(where, TYPE, str(e).rstrip(".")) from None
    _check(form, layout, where)
    try:
        changes = {
            name: _blank(layout.spaces[name], k, form.pairs) for name, k in form.widths.items()
        }
        reparametrize(model, layout, changes)
        _grow(model, layout, form)
        if form.vocabulary is not None:
            shape = Shape(form.vocabulary.common, form.vocabulary.rank)
            install_blank(model, arch, shape)
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise _damaged(where, TYPE, f"its widths do not go together ({why})") from None
    model.train(training)


def _grow(model: PreTrainedModel, layout: Layout, form: Form) -> None:
    """What the family's model has not: biases, choices of frequency pairs, shortcuts."""
    like = next(model.parameters())
    for name in form.biases:
        reader = model.get_submodule(name.removesuffix(".bias"))
        assert isinstance(reader, nn.Linear)
        reader.bias = nn.Parameter(torch.empty_like(reader.weight[:, 0]))
    for name, n in form.pairs.items():
        attention = attention_of(model, layout, name)
        attention.pairs = torch.zeros(attention.kv_heads, n, dtype=torch.int64)
    now = label(model)
    for edge in now.edges:
        stage = model.get_submodule(edge.stage)
        assert isinstance(stage, Stage)
        width = form.ranks.get(edge.target, now.spaces[edge.target].dim)
        stage.low_rank = edge.target in form.ranks
        empty = torch.empty(
            now.spaces[edge.source].dim, width, dtype=like.dtype, device=like.device
        )
        stage.shortcut = nn.Parameter(empty) if edge.stage in form.shortcuts else None


def _check(form: Form, layout: Layout, where: str) -> None:
    """Refuse names that the model has not, and widths beyond the dense model's."""
    stages, readers = {e.stage for e in layout.edges}, layout.architecture
    for name, k in form.widths.items():
        if name not in layout.spaces:
            raise _damaged(where, f"{TYPE}.widths", f"the model has no space '{name}'")
        if k > layout.spaces[name].dim:
            raise _damaged(
                where,
                f"{TYPE}.widths.{name}",
                f"{k} is more than the {layout.spaces[name].dim} of the dense model",
            )
    for name, n in form.pairs.items():
        if name not in layout.spaces or not layout.spaces[name].rotary:
            raise _damaged(where, f"{TYPE}.pairs", f"the model has no rotary space '{name}'")
        if 2 * n > form.widths.get(name, layout.spaces[name].dim):
            raise _damaged(where, f"{TYPE}.pairs.{name}", f"{n} pairs are wider than its heads")
    for name in form.shortcuts:
        if name not in stages:
            raise _damaged(where, f"{TYPE}.shortcuts", f"the model has no stage '{name}'")
    for name in form.ranks:
        if name not in layout.points:
            raise _damaged(where, f"{TYPE}.ranks", f"the stream has no point '{name}'")
    rows, width = layout.shapes[f"{readers.embed[0]}.weight"]
    asked = form.vocabulary
    if asked is not None and asked.common >= rows:
        why = f"{asked.common} leaves no rare ones of {rows} tokens"
        raise _damaged(where, f"{TYPE}.vocabulary.common", why)
    if asked is not None and asked.rank > width:
        why = f"{asked.rank} is more than the {width} of the dense model"
        raise _damaged(where, f"{TYPE}.vocabulary.rank", why)
    for name in form.biases:
        if not name.startswith(readers.blocks) or not name.endswith(".bias"):
            raise _damaged(where, f"{TYPE}.biases", f"'{name}' is no bias of a block")


def _damaged(where: str, key: str, why: str) -> InputError:
    return InputError(f"{where or 'config'}: config.json: {key}: {why}. {AGAIN}")


def _blank(space: Space, k: int, pairs: Mapping[str, int]) -> Change:
    """A change to the right width that says nothing more; of KV groups and of frequency pairs it must keep some."""
    if not space.rotary and space.kind != "heads":
        return Change.empty(space, k)
    n = pairs.get(space.name, space.rotary // 2)
    kept = columns(space.rotary, n, k - 2 * n)
    return Change.choice(space, kept)
