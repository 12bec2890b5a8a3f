"""What is known of a model by its config: its type, whether the grammar speaks of it, how many positions it has."""

from __future__ import annotations

from transformers import PretrainedConfig

from ..core.errors import InputError
from .architecture import Architecture
from .declare import read


def family_of(config: PretrainedConfig) -> str:
    """The model type of a config; of one that says what was done to its model, that of the model's family."""
    kind: str = config.model_type if config.model_type != "invariance" else config.form.family
    return kind


def check_dense(config: PretrainedConfig) -> None:
    """Raises InputError for a model of ours, which is no model to begin with."""
    if config.model_type == "invariance":
        raise InputError(
            "the model is sliced already, in a form that no stock config holds. Start from the original model, "
            "with all steps in one recipe."
        )


def known(config: PretrainedConfig) -> Architecture | str:
    """The architecture that is read of a config and proven, or why the grammar does not speak of its models."""
    dense = config.dense() if config.model_type == "invariance" else config
    return read(family_of(config), dense)


def declared(config: PretrainedConfig) -> bool:
    """Whether the blocks of a config's model are rewritten; else it goes by a derived layout."""
    return isinstance(known(config), Architecture)


def architecture(config: PretrainedConfig) -> Architecture:
    """The architecture that is read of a config. Raises InputError for one that the grammar does not speak of."""
    found = known(config)
    if isinstance(found, str):
        raise InputError(
            f"model type '{family_of(config)}': its blocks cannot be rewritten: {found}. See docs/add-a-family.md."
        )
    return found


LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""How configs call the most tokens that a model takes."""


def positions(config: PretrainedConfig) -> int | None:
    """The most tokens that a model takes: as many as its config names, where it has a table of positions; None where
    rotary positions set no limit. Of a model that is not rewritten, what its config names."""
    found = known(config)
    if isinstance(found, Architecture) and len(found.embed) == 1:
        return None
    text = config.get_text_config()
    named = (getattr(text, key, None) for key in LENGTHS)
    return next((n for n in named if isinstance(n, int)), None)


def check_positions(config: PretrainedConfig, tokens: int, where: str) -> None:
    """Raises InputError when sequences of so many tokens are longer than a model's positions."""
    limit = positions(config)
    if limit is not None and tokens > limit:
        raise InputError(
            f"{where}: sequences of {tokens} tokens, and the model has {limit} positions. "
            f"Ask for {limit} tokens or fewer."
        )
