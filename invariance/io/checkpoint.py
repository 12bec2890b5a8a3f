"""The checkpoint of a sliced model that no stock config can describe: a config of its own, loaded by AutoModel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)

from ..core.change import Change
from ..core.errors import InputError
from ..core.space import Space, columns
from ..model.canonical import canonicalize, layout_of
from ..model.families import architecture
from ..model.labels import label
from ..model.layout import Layout
from ..model.modules import Stage
from ..model.reparametrize import attention_of, reparametrize

SHARED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
"""What tools ask of any config, and slicing leaves as it is."""


class InvarianceConfig(PretrainedConfig):
    """The original model's config, and what was done to it: canonical form, matrices split in two, widths, where shortcuts
    lie, new biases. ``ranks`` says of points of the stream that the shortcut there is of low rank, and of which.

    ``nested`` holds, by its share, each of the narrower models in the same weights: the widths of the spaces that it has
    narrower than this one.
    ``pairs`` names the query/key spaces whose frequency pairs were chosen, and says how many each kept; which ones is
    in a buffer beside the weights.
    """

    model_type = "invariance"

    def __init__(
        self,
        original: dict[str, Any] | None = None,
        folded: bool = False,
        tie: str = "untie",
        widths: dict[str, int] | None = None,
        shortcuts: list[str] | None = None,
        biases: list[str] | None = None,
        pairs: dict[str, int] | None = None,
        split: list[str] | None = None,
        nested: dict[str, dict[str, int]] | None = None,
        ranks: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.original = dict(original or {})
        self.folded, self.tie = folded, tie
        self.widths, self.shortcuts = dict(widths or {}), list(shortcuts or [])
        self.biases, self.pairs = list(biases or []), dict(pairs or {})
        self.split, self.ranks = list(split or []), dict(ranks or {})
        self.nested = {share: dict(widths) for share, widths in (nested or {}).items()}
        for key in SHARED:
            kwargs.setdefault(key, self.original.get(key))
        super().__init__(**kwargs)

    def dense(self) -> PretrainedConfig:
        """The config of the original model."""
        values = dict(self.original)
        return AutoConfig.for_model(values.pop("model_type"), **values)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """What caches are made after: layers, heads, sliding windows."""
        return self.dense() if self.original else self


class InvarianceForCausalLM(PreTrainedModel, GenerationMixin):
    """A family's model with restructured blocks and widths of its own. Generates as the family's own does."""

    config_class = InvarianceConfig
    base_model_prefix = "inner"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: InvarianceConfig, inner: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.inner = _shaped(config) if inner is None else inner
        for module in () if inner is None else inner.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # else modules of ours are drawn anew
        arch = architecture(self.inner.config)
        head = self.inner.get_submodule(arch.head)
        if head.weight is self.inner.get_parameter(f"{arch.embed[0]}.weight"):
            self._tied_weights_keys = {f"inner.{arch.head}.weight": f"inner.{arch.embed[0]}.weight"}
            config.tie_word_embeddings = True
        else:
            self._tied_weights_keys = {}
            config.tie_word_embeddings = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's own: logits (B, T, V), the loss where labels are given, the stream where it is asked for: in
        front of every block, each in the basis of that point, and behind the final norm."""
        asked = (
            self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states
        )
        with _recorded(self.inner) if asked else nullcontext(()) as states:
            out = self.inner(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        if not asked:
            return out
        if isinstance(out, tuple):
            return (*out, tuple(states))
        out["hidden_states"] = tuple(states)
        return out

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()


@contextmanager
def _recorded(model: PreTrainedModel) -> Iterator[Sequence[Tensor]]:
    """What arrives at every block of a restructured model, and what the final norm makes of the last one's output.

    Transformers records by the class of a family's own layers, and ours are none of those.
    """
    arch, states = architecture(model.config), list[Tensor]()
    blocks = model.get_submodule(arch.blocks)
    handles = [
        b.register_forward_pre_hook(lambda _, args: states.append(args[0]))
        for b in blocks.children()
    ]
    final = model.get_submodule(arch.final_norm)
    handles.append(final.register_forward_hook(lambda _m, _args, out: states.append(out)))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


AutoConfig.register("invariance", InvarianceConfig)
AutoModelForCausalLM.register(InvarianceConfig, InvarianceForCausalLM)


def wrap(
    inner: PreTrainedModel,
    layout: Layout,
    original: PretrainedConfig,
    tie: str,
    nested: Mapping[str, Mapping[str, int]] | None = None,
) -> InvarianceForCausalLM:
    """A restructured, changed model as one that saves and loads; ``original`` is the config it came with, ``nested`` as
    in InvarianceConfig."""
    now = label(inner)

    def kept(name: str, k: int) -> bool:  # spaces of a branch that is gone go without saying
        return k > 0 or name in layout.branches.values()

    config = InvarianceConfig(
        original=original.to_dict(),
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
        pairs={
            n: p.shape[1]
            for n in now.select(["qk"])
            if (p := attention_of(inner, now, n).pairs) is not None
        },
        dtype=str(inner.dtype).removeprefix("torch."),
    )
    config.architectures = [InvarianceForCausalLM.__name__]
    model = InvarianceForCausalLM(config, inner)
    model.generation_config = inner.generation_config
    return model.eval()


def _shaped(config: InvarianceConfig) -> PreTrainedModel:
    """The family's model with the config's shapes; what its weights hold is for loading to say."""
    dense = config.dense()
    inner = architecture(dense).build(dense)
    layout = canonicalize(inner, fold=config.folded, tie=config.tie, split=config.split)
    changes = {
        name: _blank(layout.spaces[name], k, config.pairs) for name, k in config.widths.items()
    }
    reparametrize(inner, layout, changes)
    for name in config.biases:
        reader = inner.get_submodule(name.removesuffix(".bias"))
        assert isinstance(reader, nn.Linear)
        reader.bias = nn.Parameter(torch.empty_like(reader.weight[:, 0]))
    for name, n in config.pairs.items():
        attention = attention_of(inner, layout, name)
        attention.pairs = torch.empty(
            attention.kv_heads, n, dtype=torch.int64, device=next(attention.parameters()).device
        )
    now = label(inner)
    known = {e.target for e in now.edges}.union(now.select(["qk"]))
    if lies := sorted({*config.ranks, *config.pairs} - known):
        raise ValueError(f"'{lies[0]}' is no place in this model")
    for edge in now.edges:
        stage = inner.get_submodule(edge.stage)
        assert isinstance(stage, Stage)
        shape = (
            now.spaces[edge.source].dim,
            config.ranks.get(edge.target, now.spaces[edge.target].dim),
        )
        stage.low_rank = edge.target in config.ranks
        like = next(inner.parameters())
        empty = torch.empty(shape, dtype=like.dtype, device=like.device)
        stage.shortcut = nn.Parameter(empty) if edge.stage in config.shortcuts else None
    return inner


def _blank(space: Space, k: int, pairs: Mapping[str, int]) -> Change:
    """A change to the right width that says nothing more; of KV groups and of frequency pairs it must keep some."""
    if not space.rotary and space.kind != "heads":
        return Change.empty(space, k)
    n = pairs.get(space.name, space.rotary // 2)
    kept = columns(space.rotary, n, k - 2 * n)
    return Change.choice(space, kept)


def layout_of_config(config: PretrainedConfig, *, fold: bool = False) -> Layout:
    """The layout of a checkpoint, dense or sliced, from its config alone; ``fold`` as in canonicalize.

    Raises InputError.
    """
    if not isinstance(config, InvarianceConfig):
        return layout_of(config, fold=fold)
    try:
        with torch.device("meta"):
            return canonicalize(InvarianceForCausalLM(config).inner, fold=fold, tie=config.tie)
    except (
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        RuntimeError,
        AttributeError,
        AssertionError,
    ) as e:
        raise InputError(
            f"the config.json of this sliced checkpoint is damaged ({type(e).__name__}: {e}). "
            "Copy it from where the checkpoint was made, or run its recipe again."
        ) from None
