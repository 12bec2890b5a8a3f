"""What goes wrong and whose fault it is: one class an exit status, one clear message each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InvarianceError(Exception):
    """A run that failed through no fault of its input: exit status 1."""

    exit_status = 1


class InputError(InvarianceError):
    """A recipe, model, data set or flag that cannot be: exit status 2, nothing written.

    The message says where, what cannot be, why, and what to do instead.
    """

    exit_status = 2


class CertificateError(InvarianceError):
    """A change of basis that should have left the logits alone and did not: exit status 1."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known word, else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known) or 'none'}"
