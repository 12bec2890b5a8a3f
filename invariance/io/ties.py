"""Whether the head is the embedding: config.json says so, the weights decide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..model.vocabulary import LEAVES, is_tied
from . import shards


def settle_ties(config: PretrainedConfig, folder: Path | None) -> None:
    """A config that ties what the files of a checkpoint hold as two different tensors ties them no longer.

    From headers alone, except where both are there: transformers ties those whose numbers are equal.
    """
    if folder is None or not getattr(config, "tie_word_embeddings", False):
        return
    tied = list(_tied(config))
    if not tied:
        return
    found = shards.stored(folder)
    for head, table in tied:
        if head in found and table in found and not shards.equal(found[head], found[table]):
            config.tie_word_embeddings = False


def note_ties(model: PreTrainedModel) -> None:
    """A loaded model's config says of the head what its weights are."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Module) and isinstance(table, nn.Module):
        one = is_tied(table, head)
        if model.config.tie_word_embeddings and not one:
            model.config.tie_word_embeddings = False


def _tied(config: PretrainedConfig) -> Iterator[tuple[str, str]]:
    """The names that are one tensor where a config says so: those of the head and of the table."""
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    named = getattr(kind, "_tied_weights_keys", None)
    if not isinstance(named, dict):
        return
    yield from named.items()
    for head, table in named.items():  # whose rows may be factors
        for leaf in LEAVES:
            yield tuple(name.removesuffix("weight") + leaf for name in (head, table))  # type: ignore[misc]
