"""The certificate of a derived layout on the model at hand: all spaces at once, a control for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..model.derive.certify import CONTROL, TOLERANCE
from ..model.derive.probes import LONG, longest_that_runs
from ..model.described.accept import Accepted, accept
from ..model.described.description import Description
from ..model.described.whole import double, tokens
from ..model.verify import Certificate

COPIES = 3  # of the weights in float64: the model, what it was, and what is being turned


@dataclass(frozen=True)
class Proof:
    """What of a layout holds for a model, the longest input that it was tried on, and the certificate of all of it."""

    accepted: Accepted
    longest: int

    @property
    def certificate(self) -> Certificate:
        """The control is that of the space that shows the least, among those that any input shows."""
        shown = [moved for moved in self.accepted.controls.values() if moved > CONTROL]
        return Certificate(
            self.accepted.error, TOLERANCE, min(shown, default=0.0), len(self.accepted.controls)
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.certificate.to_dict(),
            "controls": dict(self.accepted.controls),
            "refuted": dict(self.accepted.refuted),
            "unproven": self.accepted.unproven,
            "longest": self.longest,
        }


def check_memory(numbers: int, where: str) -> None:
    """Raises InputError where so many weights cannot be certified in float64 on this machine."""
    taken, there = COPIES * 8 * numbers, psutil.virtual_memory().available
    if taken > there:
        raise InputError(
            f"{where}: a derived layout is certified with the whole model in float64, which takes {taken / 1e9:.1f} GB, and "
            f"{there / 1e9:.1f} GB are free. Use a machine with more, or a smaller model of the same type."
        )


def certify_derived(
    model: PreTrainedModel, description: Description, ids: Int[Tensor, "B T"], seed: int = 0
) -> Proof:
    """Turn a float64 copy by random elements of all spaces at once, on ids and on a long input; then one side of each.

    What moves the logits is dropped and named. Controls are asked for on ids alone.
    """
    twin = double(model)
    vocabulary = model.config.get_text_config().vocab_size
    spread = (ids[:1].repeat(1, LONG // ids.shape[1] + 1)[:, : LONG + 1] * 7 + 3) % vocabulary
    probe = longest_that_runs(twin, lambda n, length, s: tokens(spread[:n, :length]), [LONG])
    examples = [tokens(ids), *([] if probe is None else [probe.example])]
    longest = max(e["input_ids"].shape[1] for e in examples)
    return Proof(accept(twin, description, examples, seed), longest)
