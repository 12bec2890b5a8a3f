"""From the names that a checkpoint's files give its tensors to those of the model that transformers builds of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.loading_report import LoadStateDictInfo


@dataclass(frozen=True)
class Part:
    """Tensors of a checkpoint that become one of the model's, or several: ``keys``, each with the pattern that it met.

    Without a converter it is one tensor under another name, or under its own. Converters are those of transformers,
    which stacks what experts have and takes fused matrices apart.
    """

    keys: tuple[tuple[str, str], ...]
    first: str
    converter: Any = None

    def convert(self, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """The model's tensors, by its own names."""
        if self.converter is None:
            return {self.first: tensors[self.keys[0][0]]}
        converter = copy.deepcopy(self.converter)
        for key, pattern in self.keys:
            converter.add_tensor(self.first, key, pattern, tensors[key])
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def parts(model: PreTrainedModel, keys: Iterable[str]) -> tuple[list[Part], set[str]]:
    """How transformers' loading would fill the model from tensors of these names, and those it has no place for."""
    own = model.state_dict()
    before = getattr(
        model.config, "key_prefix", None
    )  # of a checkpoint that an earlier version wrote
    renamed = None if before is None else {f"^{before}": ""}
    transforms = get_model_conversion_mapping(model, renamed)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    plain, unexpected = list[Part](), set[str]()
    converted: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(keys, key=dot_natural_key):
        prefix = model.base_model_prefix
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, own)
        if name not in own:
            unexpected.add(name)
        elif pattern is None:
            plain.append(Part(((key, key),), name))
        else:
            converted.setdefault(name, []).append((key, pattern))
    fused = [Part(tuple(k), name, by_pattern[k[0][1]]) for name, k in converted.items()]
    return plain + fused, unexpected


def accounted(
    model: PreTrainedModel, missing: set[str], unexpected: set[str]
) -> tuple[set[str], set[str]]:
    """What is missing and what is too much, without the names that the family says to pass over."""
    info = LoadStateDictInfo(
        missing_keys=missing,
        unexpected_keys=unexpected,
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)
    return info.missing_keys, info.unexpected_keys
