"""What of a type can be cut: each kind of space tried on the tiny model, cut against zeroed, and built again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..core.errors import InputError
from .derive.certify import CONTROL, TOLERANCE, distance, outputs
from .derive.trace import Example
from .described.describe import describe
from .described.description import Description
from .described.source import Source
from .described.weightless import on_meta, plain
from .narrow.certificate import reference, tried
from .narrow.kinds import Samples, samples
from .narrow.record import apply, record
from .narrow.stock import differences

BUFFERS = 1e-6  # the library computes some in float32


@dataclass(frozen=True)
class Cuttable:
    """One kind. ``plain``: a stock config says it; else a checkpoint of ours records it. ``why``: of what does not hold."""

    kind: str
    error: float = float("inf")  # ‖cut − zeroed‖ / ‖zeroed‖
    control: float = 0.0  # the same, where others are zeroed
    plain: bool = False
    why: str = ""

    @property
    def holds(self) -> bool:
        return not self.reason

    @property
    def reason(self) -> str:
        """Why it does not hold; empty where it does."""
        if self.why or not self.error <= TOLERANCE:
            return self.why or f"cut and zeroed differ by {self.error:.0e}"
        return (
            "" if self.control > CONTROL else f"zeros elsewhere differ by {self.control:.0e} only"
        )


def cuttable(
    model: PreTrainedModel, accepted: Source, examples: Sequence[Example]
) -> list[Cuttable]:
    """Every kind of what was certified, and whether its cut holds. Nothing is raised.

    ``examples``: what the layout is read on, and one to try cuts on.
    """
    try:
        found = describe(accepted, model.config.model_type, seen_by=(model, examples[0]))
        kinds = samples(found.flat(), on_meta(model.config, type(model)))
    except Exception as e:  # a type without a description has nothing to cut
        return [Cuttable("all", why=told(e))]
    return [of_kind(model, found, kind, some, examples[-1]) for kind, some in kinds.items()]


def of_kind(
    model: PreTrainedModel, found: Description, kind: str, some: Samples, example: Example
) -> Cuttable:
    """One kind, cut in all of its spaces at once."""
    try:
        small, done, error = tried(model, found, some(False), example)
        control = distance(reference(model, found, some(True), example), outputs(small, example))
        said = bool(done.changes) and not differences(small)
        why = "" if said or not error <= TOLERANCE else rebuilt(small, example)
    except (InputError, RuntimeError, ValueError, AttributeError, LookupError, TypeError) as e:
        return Cuttable(kind, why=told(e))
    return Cuttable(kind, error, control, said, why)


def rebuilt(small: PreTrainedModel, example: Example) -> str:
    """Why a model made of its config, its record and its weights is another one; empty where it is the same."""
    found = record(small)
    if isinstance(found, str):
        return found
    config = copy.deepcopy(small.config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False  # as tiny models are
    again = plain(config, type(small)).double().eval()
    apply(again, found)
    again.load_state_dict(copy.deepcopy(small.state_dict()))
    error = distance(outputs(small, example), outputs(again, example))
    return "" if error <= BUFFERS else f"read again it differs by {error:.0e}"


def told(error: Exception) -> str:
    return " ".join(f"{error}".split())[:160] or type(error).__name__
