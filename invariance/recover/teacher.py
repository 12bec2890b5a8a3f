"""The dense model as a teacher: its predictions, kept on disk, and its stream, mapped into the student's basis."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ..core.cache import cache_dir
from ..core.errors import InputError
from ..core.progress import Progress
from ..core.sealed import read_kept, write_kept
from ..io.basis_file import Basis
from ..io.data import Tokens
from ..io.models import weights_digest
from ..model.canonical import canonicalize
from ..model.copies import copy_in
from ..model.layout import Layout
from ..model.vocabulary import factored

SHARD = 16  # windows in a file of kept predictions
KEPT_FORMAT = "2"  # counts up when predictions of the same model and tokens come out different
Streams = dict[str, Float[Tensor, "B T d"]]  # point of the stream → what arrives there


@dataclass(frozen=True)
class Teacher:
    """The dense model in the canonical form that the student was cut from, in float32, not trained."""

    model: PreTrainedModel
    layout: Layout
    basis: Basis

    @classmethod
    def of(cls, dense: PreTrainedModel, basis: Basis) -> Teacher:
        twin = copy_in(torch.float32, dense).requires_grad_(False)
        layout = canonicalize(twin, fold=basis.folded)
        return cls(twin, layout, basis)

    def mapped(self, x: Float[Tensor, "*B d"], point: str) -> Float[Tensor, "*B k"]:
        """The dense stream at a student's point, in the student's basis: what it would be, were nothing cut."""
        E = self.basis.encode.get(point)
        return x if E is None else x @ E.to(x.device, x.dtype)

    @torch.no_grad()
    def streams(self, ids: Int64[Tensor, "B T"], mask: Tensor | None) -> Streams:
        """The dense stream at each of the student's points that ``tapped`` names, mapped; no logits are computed."""
        with tapped(self.model, self.layout) as found:
            self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        _, *theirs = (
            self.basis.points.items()
        )  # the embedding is not tapped, whichever block follows it
        return {ours: self.mapped(found[dense], ours) for ours, dense in theirs if dense in found}

    def check(self, student: PreTrainedModel, layout: Layout) -> None:
        """Raises InputError where the map from the dense stream to the student's is not the student's."""
        if layout.architecture.embed != self.layout.architecture.embed:
            raise InputError(
                "the dense model is of another family than this one, so its states could not be compared. Give "
                "the model that this one was sliced from."
            )
        if self.basis.points.get(layout.points[-1]) != self.layout.points[-1]:
            raise InputError(
                f"this model has {layout.depth} stages and the dense one {self.layout.depth}, and no basis.safetensors says "
                "which blocks are left. Copy that from where the checkpoint was made, to beside model/, or train without "
                "`hidden` and `local`."
            )
        table, first = f"{layout.architecture.embed[0]}.weight", layout.points[0]
        shape = factored(student, layout.architecture)
        rows = student.get_submodule(layout.architecture.embed[0]).weight
        assert isinstance(rows, Tensor)
        ours, theirs = rows.float(), self.model.get_parameter(table)
        mapped = self.mapped(theirs, first) if theirs.shape[0] == ours.shape[0] else theirs
        if shape is not None:  # the others are near it as the head reads them
            ours, mapped = ours[: shape.common], mapped[: shape.common]
        if mapped.shape != ours.shape or not (mapped - ours).norm() < ours.norm():
            raise InputError(
                "the dense model's embedding, in this model's basis, is not this model's embedding, so its states could "
                "not be compared. Give the model that this one was sliced from, with basis.safetensors beside model/."
            )


@contextmanager
def tapped(model: PreTrainedModel, layout: Layout) -> Iterator[Streams]:
    """Keep what arrives at every block but the first, and at the final norm, while a restructured model runs."""
    found: Streams = {}
    paths = {e.entry: f"{layout.architecture.blocks}.{e.block}" for e in layout.edges}
    del paths[layout.points[0]]
    paths[layout.points[-1]] = layout.architecture.final_norm

    def keep(point: str, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        found[point] = args[0] if args else kwargs["hidden_states"]

    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, kwargs, point=point: keep(point, args, kwargs), with_kwargs=True
        )
        for point, path in paths.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Predictions:
    """A folder of the dense model's most likely tokens and their log-probabilities, in files of SHARD windows."""

    folder: Path

    def of(self, n: int) -> dict[str, Tensor]:
        """``top`` (T, k) token ids and ``logp`` (T, k) of window n; what is missing of one is the others' mass."""
        with safe_open(self.folder / f"{n // SHARD:06d}.safetensors", "pt") as file:
            return {name: file.get_slice(name)[n % SHARD] for name in ("top", "logp")}


@torch.no_grad()
def predictions(
    dense: PreTrainedModel, tokens: Tokens, k: int, batch: int, progress: Progress
) -> Predictions:
    """What a model predicts at every token: computed once, then found under a hash of weights and tokens.

    What was computed is kept when it is interrupted.
    """
    k = min(k, dense.config.get_text_config().vocab_size)
    identity = {
        "format": KEPT_FORMAT,
        "weights": weights_digest(dense),
        "tokens": tokens.digest(),
        "k": k,
        "config": dense.config.to_json_string(use_diff=False),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    kept = Predictions(cache_dir("predictions", key))
    starts = range(0, len(tokens.ids), SHARD)
    files = {s: kept.folder / f"{s // SHARD:06d}.safetensors" for s in starts}
    missing = [s for s, file in files.items() if read_kept(file) is None]
    for start in progress(missing, "predictions of the dense model", len(missing)):
        found = [_predict(dense, ids, mask, k) for ids, mask in _part(tokens, start).batches(batch)]
        top, logp = (torch.cat(parts) for parts in zip(*found, strict=True))
        write_kept(
            kept.folder / f"{start // SHARD:06d}.safetensors", {"top": top.int(), "logp": logp}
        )
    return kept


def _part(tokens: Tokens, start: int) -> Tokens:
    return Tokens(tokens.ids[start : start + SHARD], tokens.mask[start : start + SHARD])


def _predict(model: PreTrainedModel, ids: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    padded = None if bool(mask.all()) else mask.long().to(model.device)
    logits = model(
        input_ids=ids.to(model.device), attention_mask=padded, use_cache=False
    ).logits.float()
    values, top = logits.topk(k, -1)
    return top.cpu(), (values - logits.logsumexp(-1, keepdim=True)).cpu()
