"""A narrower model of a derived layout that no stock config says: its family's own class, with a record of the rest."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from ..core.errors import InputError
from ..model.described.weightless import on_meta, stored
from ..model.narrow.record import Record, apply, fill_buffers, record
from .form import AGAIN, LEFT_OUT, read_part

TYPE = "invariance-narrowed"
KEY = "narrowed"

if TYPE_CHECKING:
    Mixed = PreTrainedModel
else:
    Mixed = object


class NarrowedConfig(PretrainedConfig):
    """A family's config, with what is narrower under ``narrowed``; each family has a subclass of both."""

    model_type = TYPE
    narrowed: dict[str, Any] | None = None

    @property
    def record(self) -> Record:
        """What is narrower. Raises InputError that names the key that cannot be."""
        return read_part(Record, self.narrowed, KEY, str(self._name_or_path))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if cls is not NarrowedConfig:
            return super().from_dict(config_dict, **kwargs)
        where = str(kwargs.get("name_or_path") or "")
        family = read_part(Record, config_dict.get(KEY), KEY, where).family
        if (
            family not in CONFIG_MAPPING
            or CONFIG_MAPPING[family] not in MODEL_FOR_CAUSAL_LM_MAPPING
        ):
            raise InputError(
                f"{where or 'config'}: config.json: {KEY}.family: this version of transformers knows no causal model of type "
                f"'{family}'. Install the version that wrote the checkpoint, or a later one."
            )
        return config_class(CONFIG_MAPPING[family]).from_dict(config_dict, **kwargs)


class NarrowedForCausalLM(Mixed):
    """What such models are beside their family's own class, of which each is a subclass."""

    config: NarrowedConfig

    def __init__(self, config: NarrowedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        try:
            apply(self, config.record)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            where = config._name_or_path or "config"
            raise InputError(
                f"{where}: config.json: {KEY} does not go with its family ({why}). {AGAIN}"
            ) from None
        self.tie_weights()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        found = super().from_pretrained(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        fill_buffers(model, model.config.record)  # which loading makes as the family has them
        return found

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        found = super().resize_token_embeddings(*args, **kwargs)
        now, shapes = stored(self), self.config.record.shapes
        assert self.config.narrowed is not None
        self.config.narrowed |= {"shapes": {name: list(now[name].shape) for name in shapes}}
        return found


def config_class(base: Any) -> type[NarrowedConfig]:
    """The subclass of a family's config class; from here on AutoModelForCausalLM knows the model's."""
    if base in _MADE:
        return _MADE[base]
    own = {"__module__": __name__, "__annotations__": {KEY: dict[str, Any] | None}, KEY: None}
    made: Any = strict(
        type(f"Narrowed{base.__name__}", (NarrowedConfig, base), {**own, "model_type": TYPE})
    )
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base]
    can = {
        name: classmethod(lambda cls, name=name: getattr(family, name)())
        for name in ("_can_set_attn_implementation", "_can_set_experts_implementation")
    }  # which transformers reads off the source of the module that a class is in
    values = {"__module__": __name__, "config_class": made, "config": None, **can}
    sub = type(f"Narrowed{family.__name__}", (NarrowedForCausalLM, family), values)
    AutoModelForCausalLM.register(made, sub)
    return _MADE.setdefault(base, made)


_MADE: dict[Any, type[NarrowedConfig]] = {}
AutoConfig.register(TYPE, NarrowedConfig)


def narrowed(model: PreTrainedModel, where: str = "") -> PreTrainedModel:
    """The model in a class that saves and loads, in the same tensors. Raises InputError where no record could say it."""
    found, base = record(model), type(model.config)
    if base not in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = f"the config class '{base.__name__}' is not registered with AutoModelForCausalLM"
    if isinstance(found, str):
        raise InputError(
            f"{where or 'export'}: no checkpoint holds what was cut: {found}. Cut other spaces, or use other widths."
        )
    values = {k: v for k, v in copy.deepcopy(model.config.to_dict()).items() if k not in LEFT_OUT}
    config = config_class(base)(**values, narrowed=found.model_dump(mode="json"))
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and table is not None and head.weight is not table.weight:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    config._attn_implementation = model.config._attn_implementation
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    made = on_meta(config, kind)
    made.load_state_dict(model.state_dict(), assign=True)
    made.tie_weights()
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        made.get_submodule(owner)._buffers[leaf] = buffer
    made.config._attn_implementation = model.config._attn_implementation
    made.config.dtype = model.dtype
    made.config.architectures = [type(made).__name__]
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.train(model.training)
