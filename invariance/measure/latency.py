"""Latency by width: parts of one block timed on this machine with made-up weights, tabulated once, interpolated."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..core.kind import Kind
from ..core.progress import Progress, quiet
from ..core.sealed import read_kept_json, write_kept_json
from ..core.space import Space
from ..io.checkpoint import custom
from ..model.canonical import layout_of
from ..model.families import positions
from ..model.layout import Layout
from ..model.reparametrize import attention_of

TOKENS = 256  # of the one sequence that is timed, in float32
ROUNDS = (
    8  # the first warms up; of the others the fastest counts, which other programs disturbed least
)
POINTS = 4  # widths at which each space is timed, its whole one included
SMALL = 64  # tokens in the vocabulary where the head is not timed
STEADY = 1.2  # by which factor the fastest of every other round, and of the rest, may differ
FORMAT = "2"  # counts up when the same table comes out different
TOGETHER = "qk+vo"  # kernels are made for queries, keys and values of one width, and may be slower where they differ
READ_BY = {
    "attention": ("residual", "heads", "qk", "vo", TOGETHER),
    "mlp": ("residual", "mlp"),
    "head": ("residual",),
}  # part of a model → the kinds of spaces on whose widths its time depends

Curve = Mapping[int, float]  # width → seconds


@dataclass(frozen=True)
class Latency:
    """What one sequence of TOKENS tokens takes, part by part, as one space's width changes and all others are whole.

    Between measured widths seconds are interpolated, below the narrowest they stay, and they never fall as a space
    widens. Cuts of several spaces: queries, keys and values cut to one width are timed together, what is cut beyond it
    counts as if it were alone; the stream's and the KV groups' factors multiply that. Shortcuts count as the head does,
    by products; matrices in two factors lower the time of their branch as they lower its products.
    """

    curves: Mapping[str, Mapping[str, Curve]]  # part → kind of space → its curve
    steady: bool = True  # whether the rounds of the measurement agreed

    @cached_property
    def _lines(self) -> dict[tuple[str, str], tuple[list[int], list[float]]]:
        """Every curve as its widths and, made to rise, its times relative to the whole."""
        found = {}
        for part, kinds in self.curves.items():
            for kind, curve in kinds.items():
                widths = sorted(curve)
                seconds = np.maximum.accumulate([curve[k] for k in widths])
                found[part, kind] = widths, (seconds / seconds[-1]).tolist()
        return found

    def share(self, part: str, kind: str, width: int) -> float:
        """The time of a part with a space at some width, relative to its whole."""
        return float(np.interp(width, *self._lines[part, kind]))

    def _head(self, part: str, widths: Mapping[str, int]) -> float:
        """The time of attention with heads of some widths: both cut to the wider one, then the narrower one alone."""
        if TOGETHER not in self.curves[part]:  # they differ in the whole model
            return max(1 - sum(1 - self.share(part, kind, k) for kind, k in widths.items()), 0.0)
        narrow = min(widths, key=widths.__getitem__)
        wide = max(widths.values())
        alone = self.share(part, narrow, widths[narrow]) / self.share(part, narrow, wide)
        return self.share(part, TOGETHER, wide) * alone

    def whole(self, part: str) -> float:
        return max(self.curves[part]["residual"].values())

    def seconds(self, layout: Layout, widths: Mapping[str, int], shortcuts: int) -> float:
        """The time of a model of these widths whose shortcuts take so many products per token."""

        def share(part: str, kind: str, space: str) -> float:
            return self.share(part, kind, layout.width(space, widths))

        stream = {e.stage: e.source for e in layout.edges}
        last = layout.points[-1]
        total = self.whole("head") * share("head", "residual", last)
        for branch, space in layout.branches.items():
            if not layout.width(space, widths):
                continue
            stage, _, part = branch.rpartition(".")
            time = (
                self.whole(part)
                * share(part, "residual", stream[stage])
                * layout.split_products(branch, widths)
            )
            if part == "mlp":
                total += time * share("mlp", "mlp", space)
                continue
            beside = [s for s in layout.spaces.values() if s.block == layout.spaces[space].block]
            widths_of_head = {
                s.kind.value: layout.width(s.name, widths)
                for s in beside
                if s.kind in (Kind.QK, Kind.VO)
            }
            total += time * share(part, "heads", space) * self._head(part, widths_of_head)
        return total + shortcuts * self.whole("head") / prod(
            layout.shapes[f"{layout.architecture.embed[0]}.weight"]
        )


def table(
    config: PretrainedConfig,
    folder: Path,
    device: str | torch.device = "cpu",
    progress: Progress = quiet,
) -> Latency:
    """The table of a family's config on this machine: from the folder, or measured. Needs no weights of the model."""
    length = min(TOKENS, positions(config) or TOKENS)
    values = config.to_dict() | {
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "dtype": "float32",
    }
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:1]
    identity = {
        "format": FORMAT,
        "machine": [platform.machine(), _processor(), os.cpu_count()],
        "device": torch.cuda.get_device_name(device)
        if torch.device(device).type == "cuda"
        else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "config": values,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    path = folder / f"{digest[:32]}.json"
    try:
        found = (read_kept_json(path) or {})["curves"]
        return Latency(
            {
                p: {
                    kind: {int(k): float(s) for k, s in curve.items()}
                    for kind, curve in kinds.items()
                }
                for p, kinds in found.items()
            }
        )
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        pass  # a file that cannot be read counts as missing
    made = _measure(values, length, torch.device(device), progress)
    if made.steady:  # else the next run measures again
        of = {k: v for k, v in identity.items() if k != "config"}
        write_kept_json(path, {"measured_on": of, "curves": made.curves})
    return made


def widths_of(space: Space) -> list[int]:
    """The widths at which a space is timed, its whole one last."""
    asked = {round(space.dim * n / POINTS) for n in range(1, POINTS)}
    return [*sorted(k for k in asked if 0 < k < space.dim and space.fits(k)), space.dim]


@torch.no_grad()
def _measure(
    values: dict[str, Any], length: int, device: torch.device, progress: Progress
) -> Latency:
    """Time a block of made-up weights, whole and with the spaces of each kind narrowed alone, in turn, round by round."""
    layout = layout_of(AutoConfig.for_model(**values), fold=True)
    spaces: dict[str, Space] = {s.kind: s for s in layout.spaces.values()}
    if spaces["qk"].dim == spaces["vo"].dim:
        spaces[TOGETHER] = spaces["qk"]
    choices = [(kind, k) for kind, space in spaces.items() for k in widths_of(space)]
    blocks = {choice: _block(values, layout, *choice, device) for choice in choices}
    ids = torch.arange(length, device=device).remainder(min(SMALL, values["vocab_size"]))[None]
    times: dict[tuple[str, int], dict[str, list[float]]] = {choice: {} for choice in choices}
    turns = [(n, choice) for n in range(ROUNDS) for choice in choices]
    for n, choice in progress(turns, "time a block by width", len(turns)):
        for part, seconds in _timed(blocks[choice], layout, ids).items():
            if n:
                times[choice].setdefault(part, []).append(seconds)
    curves = {
        part: {
            kind: {k: min(times[kind, k][part]) for k in widths_of(spaces[kind])}
            for kind in kinds
            if kind in spaces
        }
        for part, kinds in READ_BY.items()
    }
    whole = (
        times[kind, spaces[kind].dim][part] for part, kinds in curves.items() for kind in kinds
    )
    return Latency(curves, all(_agree(min(t[::2]), min(t[1::2], default=min(t))) for t in whole))


def _agree(a: float, b: float) -> bool:
    return max(a, b) <= STEADY * min(a, b)


def _block(
    values: dict[str, Any], layout: Layout, kind: str, k: int, device: torch.device
) -> PreTrainedModel:
    """A model of one block whose spaces of a kind have width k; its tables are small where the head is not timed."""
    names = [n for n, s in layout.spaces.items() if s.kind in kind.split("+") and s.dim > k]
    original = values if kind in READ_BY["head"] else values | {"vocab_size": SMALL}
    pairs = {n: (k - layout.spaces[n].spared) // 2 for n in names if layout.spaces[n].rotary}
    with torch.device("meta"):
        config = custom(
            AutoConfig.for_model(**original),
            folded=True,
            widths=dict.fromkeys(names, k),
            pairs=pairs,
        )
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(
            0.5**12 if tensor.is_floating_point() else 0
        )  # nothing subnormal, which is slow
    for name, n in pairs.items():
        attention = attention_of(model, layout, name)
        attention.pairs = torch.arange(n, device=device).repeat(attention.kv_heads, 1)
    return model.eval()


def _timed(model: PreTrainedModel, layout: Layout, ids: Int[Tensor, "B T"]) -> dict[str, float]:
    """The seconds that each part of a model of one block takes."""
    paths = {b.rpartition(".")[2]: b for b in layout.branches} | {"head": layout.architecture.head}
    begun: dict[str, float] = {}
    spent: dict[str, float] = {}

    def now() -> float:
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    handles = []
    for part, path in paths.items():
        module = model.get_submodule(path)
        handles.append(
            module.register_forward_pre_hook(lambda *_, p=part: begun.update({p: now()}))
        )
        handles.append(
            module.register_forward_hook(lambda *_, p=part: spent.update({p: now() - begun[p]}))
        )
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return spent


def _processor() -> str:
    """The processor's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""
    )
