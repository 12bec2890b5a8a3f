"""The contract of models: what is supposed of a family, tried on one model of it, in memory or in a folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibrate.certificate import certify_random
from ..core.errors import InvarianceError
from ..io.checkpoint import layout_of_config
from ..io.models import load_model
from ..io.source import live
from ..model.entry import check_model as checked
from ..model.families import family_of, positions
from ..model.verify import logits, relative_error, tolerance

TOKENS = 24


def check_model(model: PreTrainedModel | str | Path) -> None:
    """Try what is supposed of a model: one in memory, a folder, or whatever ``invariance.load`` reads.

    Random elements of the groups of all its spaces at once leave its logits, in float64, while half of a change moves them. It
    computes the same with a cache, token by token, as without; padded in front as not; and again after it was saved and
    loaded, to the last bit.

    Raises AssertionError that says what does not hold, InputError for a model that cannot be worked on.
    """
    found = checked(load_model(str(model)) if isinstance(model, str | Path) else model).eval()
    name = type(found).__name__
    vocabulary = found.config.get_text_config().vocab_size
    length = min(TOKENS, positions(found.config) or TOKENS)
    ids = torch.randint(1, vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    try:
        certificate = certify_random(live(found), ids, seed=0)
    except InvarianceError as e:
        raise AssertionError(f"{name}: {e}") from e
    assert certificate.passed, f"{name}: {certificate.failure}"
    whole = logits(found, ids)
    assert bool(torch.isfinite(whole).all()), f"{name}: its logits are not finite"
    bound = tolerance(found.dtype, layout_of_config(found.config).depth)
    for what, other in (("a cache", _by_cache(found, ids)), ("padding", _padded(found, ids))):
        error = relative_error(whole, other)
        assert error <= bound, (
            f"{name} ({family_of(found.config)}): with {what} its logits differ by {error:.1e}, where rounding explains "
            f"{bound:.1e}"
        )
    again = _saved(found)
    error = relative_error(whole, logits(again, ids))
    assert error == 0, f"{name}: saved and loaded, its logits differ by {error:.1e}"


@torch.no_grad()
def _by_cache(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    out: Any = None
    parts = []
    for n in range(ids.shape[1]):
        past = None if out is None else out.past_key_values
        out = model(
            input_ids=ids[:, n : n + 1].to(model.device), past_key_values=past, use_cache=True
        )
        parts.append(out.logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def _padded(model: PreTrainedModel, ids: torch.Tensor, by: int = 3) -> torch.Tensor:
    """The logits of sequences with padding in front, which is masked."""
    limit = positions(model.config)
    by = by if limit is None else min(by, limit - ids.shape[1])
    wide = torch.cat((torch.zeros(len(ids), by, dtype=ids.dtype), ids), 1).to(model.device)
    mask = torch.ones_like(wide)
    mask[:, :by] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(input_ids=wide, attention_mask=mask, position_ids=places, use_cache=False)
    return out.logits[:, by:]


def _saved(model: PreTrainedModel) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_model(folder, dtype=model.dtype, device=str(model.device)).eval()
