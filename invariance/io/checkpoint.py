"""A sliced model that no stock config holds: a subclass of its family's own class, which AutoModelForCausalLM loads."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init

from ..core.errors import InputError
from ..model.canonical import layout_of
from ..model.families import architecture
from ..model.labels import label
from ..model.layout import Layout
from ..model.modules import Attention, Norm, Stage
from ..model.reparametrize import attention_of
from ..model.vocabulary import Head, Rows, factored
from .form import LEFT_OUT, TYPE, Form, read_form, upgraded
from .narrow import narrow
from .skeleton import parameters_on_meta, skeleton

if TYPE_CHECKING:
    Mixed = PreTrainedModel
else:
    Mixed = object


class InvarianceConfig(PretrainedConfig):
    """A family's config, with what was done to the model under ``invariance``; each family has a subclass of both.

    The family's own keys say what the model is now where one number can: the width of its embedding. Reading a
    config.json through this class gives the family's.
    """

    model_type = TYPE
    invariance: dict[str, Any] | None = None

    @property
    def form(self) -> Form:
        """What was done to the model. Raises InputError that names the key that cannot be."""
        return read_form(self.invariance or {}, self._name_or_path)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if cls is not InvarianceConfig:
            return super().from_dict(config_dict, **kwargs)
        where = str(kwargs.get("name_or_path") or "")
        values = upgraded(config_dict, where)
        form = read_form(values[TYPE], where)
        if form.family not in CONFIG_MAPPING:
            raise InputError(
                f"{where or 'config'}: config.json: {TYPE}.family: this version of transformers knows no model type "
                f"'{form.family}'. Install the version that wrote the checkpoint, or a later one."
            )
        return config_class(form.family).from_dict(values, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()
        values.pop("key_prefix", None)  # of the files that it came from
        return values

    def dense(self) -> PretrainedConfig:
        """The config that the model had in its family."""
        values = copy.deepcopy(self.to_dict())
        for key in LEFT_OUT:
            values.pop(key, None)
        form = self.form
        return AutoConfig.for_model(form.family, **{**values, **form.dense})

    @contextmanager
    def as_dense(self) -> Iterator[None]:
        """Meanwhile the family's keys are the dense model's, for the family's own code to build and initialise by."""
        dense = self.form.dense if self.invariance else {}
        now = {key: getattr(self, key) for key in dense}
        try:
            for key, value in dense.items():
                setattr(self, key, value)
            yield
        finally:
            for key, value in now.items():
                setattr(self, key, value)


class InvarianceForCausalLM(Mixed):
    """What models of ours are beside their family's own class, of which each is a subclass.

    Its layers pass for the family's (``as_one_of``), so all that transformers does with the family's models works.
    """

    config: InvarianceConfig

    def __init__(self, config: InvarianceConfig, *args: Any, **kwargs: Any) -> None:
        device = torch.get_default_device()
        with parameters_on_meta(), init.no_init_weights(), config.as_dense():
            super().__init__(config, *args, **kwargs)
        narrow(self, config.form, config._name_or_path)
        if device.type != "meta":
            self._fill(device)

    def _fill(self, device: torch.device) -> None:
        """Real weights, random ones, as the family's own class has when it is made of a config alone."""
        made: dict[int, nn.Parameter] = {}
        for name, p in list(self.named_parameters(remove_duplicate=False)):
            new = made.setdefault(id(p), nn.Parameter(torch.empty_like(p, device=device)))
            path, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(path), leaf, new)
        for module in self.modules():
            _draw(module)
        with self.config.as_dense():
            self.init_weights()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        prefix = getattr(kwargs.get("config"), "key_prefix", None)
        if prefix is None:
            return super().from_pretrained(*args, **kwargs)
        found = super().from_pretrained(*args, **kwargs, key_mapping={f"^{prefix}": ""})
        vars(found[0] if isinstance(found, tuple) else found).pop("_weight_conversions")
        return found

    def _adjust_bias(self, output_embeddings: nn.Module, input_embeddings: nn.Module) -> None:
        """A head of two factors has as many biases as rows, and its rows may not all be read yet."""
        if not isinstance(output_embeddings, Head):
            super()._adjust_bias(output_embeddings, input_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.get_input_embeddings(), Rows):
            raise InputError(
                "the rows of rare tokens are two factors, and no tokens can be added or taken. Resize the model that it was "
                "made of, and run the recipe again."
            )
        return super().resize_token_embeddings(*args, **kwargs)

    def _get_static_cache_init_shape(self) -> tuple[list[int], list[int]] | None:
        """Heads and their width by layer, for caches that are made in advance; None where one number is not all."""
        attentions = [m for m in self.modules() if isinstance(m, Attention)]
        widths = {
            a.layer_idx: (
                a.kv_heads,
                a.k.out_features // a.kv_heads,
                a.v.out_features // a.kv_heads,
            )
            for a in attentions
        }
        layers = range(self.config.num_hidden_layers)
        if any(i not in widths or widths[i][1] != widths[i][2] for i in layers):
            return None
        return [widths[i][0] for i in layers], [widths[i][1] for i in layers]


@torch.no_grad()
def _draw(module: nn.Module) -> None:
    """Numbers for what modules of ours have and no family's initialisation knows."""
    if isinstance(module, Norm):
        if module.gain is not None:
            init.constant_(module.gain, 1 - module.offset)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, Stage) and module.shortcut is not None:
        init.normal_(module.shortcut, std=module.shortcut.shape[0] ** -0.5)
    elif isinstance(module, Rows):
        for part in (module.common, module.rare, module.basis):
            init.normal_(part, std=part.shape[1] ** -0.5)
        if isinstance(module, Head) and module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, Attention) and module.pairs is not None:
        first = torch.arange(module.pairs.shape[1], device=module.pairs.device)
        init.copy_(module.pairs, first.expand_as(module.pairs))


@cache
def config_class(family: str) -> type[InvarianceConfig]:
    """The subclass of a family's config class; from here on AutoModelForCausalLM knows the model's."""
    base: type[PretrainedConfig] = CONFIG_MAPPING[family]

    def validate_architecture(self: InvarianceConfig) -> None:
        with self.as_dense():
            base.validate_architecture(self)  # type: ignore[attr-defined]

    own = {
        "__module__": __name__,
        "__annotations__": {TYPE: dict[str, Any] | None},
        TYPE: None,
        "model_type": TYPE,
        "validate_architecture": validate_architecture,
    }
    made: Any = strict(type(f"Sliced{base.__name__}", (InvarianceConfig, base), own))
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base]
    bases = (InvarianceForCausalLM, model)
    sliced = type(
        f"Sliced{model.__name__}",
        bases,
        {"__module__": __name__, "config_class": made, "config": None},
    )
    AutoModelForCausalLM.register(made, sliced)
    return made


AutoConfig.register(TYPE, InvarianceConfig)


def custom(original: PretrainedConfig, **form: Any) -> InvarianceConfig:
    """A family's config with what was done to the model: the fields of Form, but ``family`` and ``dense``."""
    values = {k: v for k, v in copy.deepcopy(original.to_dict()).items() if k not in LEFT_OUT}
    arch, dense = architecture(original), dict[str, Any]()
    key = dict(arch.widths)["residual"]
    heads = values["num_attention_heads"]
    if arch.rotary is not None and not values.get("head_dim"):
        values["head_dim"] = (
            values[key] // heads
        )  # else it would be told from the stream's new width
    if (width := form.get("widths", {}).get("x.0.0")) is not None:
        dense[key], values[key] = values[key], width
    said = Form(family=original.model_type, dense=dense, **form)
    return config_class(said.family)(**values, invariance=said.model_dump(mode="json"))


def described(
    model: PreTrainedModel,
    layout: Layout,
    original: PretrainedConfig,
    tie: str,
    nested: Mapping[str, Mapping[str, int]] | None = None,
) -> InvarianceConfig:
    """The config of a restructured, changed model, which may be on the meta device; ``layout`` is that of the canonical
    form before it was changed, ``original`` the config it came with, ``nested`` as in Form."""
    now = label(model)

    def kept(name: str, k: int) -> bool:  # spaces of a branch that is gone go without saying
        return k > 0 or name in layout.branches.values()

    shape = factored(model, now.architecture)
    chosen = {n: attention_of(model, now, n).pairs for n in now.select(["qk"])}
    config = custom(
        original,
        folded=layout.folded,
        tie=tie,
        widths={
            name: k
            for name, k in layout.widths(now).items()
            if k != layout.spaces[name].dim and kept(name, k)
        },
        shortcuts=sorted(now.shortcuts),
        ranks=dict(now.ranks),
        biases=now.added_biases(layout),
        split=now.select(["edge"]),
        nested={share: dict(widths) for share, widths in (nested or {}).items()},
        pairs={n: p.shape[1] for n, p in chosen.items() if p is not None},
        vocabulary=None if shape is None else asdict(shape),
    )
    config.tie_word_embeddings = now.tied
    config.dtype = model.dtype
    return config


def wrap(
    inner: PreTrainedModel,
    layout: Layout,
    original: PretrainedConfig,
    tie: str,
    nested: Mapping[str, Mapping[str, int]] | None = None,
) -> PreTrainedModel:
    """A restructured, changed model as one that saves and loads, in the same tensors; see ``described``."""
    config = described(inner, layout, original, tie, nested)
    model = skeleton(config)
    model.load_state_dict(inner.state_dict(), assign=True)
    model.tie_weights()
    for name, buffer in inner.named_buffers():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, buffer)
    model.config.dtype = inner.dtype
    model.config.architectures = [type(model).__name__]
    model.generation_config = inner.generation_config
    return model


def layout_of_config(
    config: PretrainedConfig,
    *,
    fold: bool = False,
    tie: str | None = None,
    split: Collection[str] = (),
) -> Layout:
    """The layout of a checkpoint, dense or sliced, from its config alone; ``fold``, ``tie``, ``split`` as in canonicalize.

    Raises InputError.
    """
    if tie is None:
        tie = config.form.tie if isinstance(config, InvarianceConfig) else "untie"
    return layout_of(config, fold=fold, tie=tie, split=split)
