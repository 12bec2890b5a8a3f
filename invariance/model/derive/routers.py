"""A router's scores and the experts behind it: linked here as a proposal, accepted by the certificate alone."""

from __future__ import annotations

import torch

from .arrays import core
from .ids import Mark
from .record import Record


def is_stack(r: Record, name: str) -> bool:
    """Whether a weight is a stack of matrices or vectors, one for each expert or head."""
    fields = r.weights[name].fields
    return bool(fields) and r.ids.marked(int(core(fields[0]).flatten()[0]), Mark.LEAD)


def link_experts(r: Record) -> list[list[int]]:
    """Each score is one coordinate with a place in every stack that was first used after it, before the next router.

    The places of each stack that was linked. Scores without a stack are frozen.
    """
    ids, names = r.ids, list(r.weights)
    ids.op = "topk"
    experts: list[list[int]] = []
    for i, router in enumerate(r.routers):
        until = min(
            (q.after for q in r.routers[i + 1 :] if q.after > router.after), default=len(names)
        )
        stacks = [n for n in names[router.after : until] if is_stack(r, n)]
        found = [places for n in stacks if len(places := places_of(r, n)) == len(router.ids)]
        if len(set(router.ids)) != len(router.ids) or not found:
            ids.freeze(torch.tensor(router.ids))
            continue
        for places in found:
            ids.met(zip(router.ids, places, strict=True))
            for a, b in zip(router.ids, places, strict=True):
                ids.merge(a, b)
        experts += found
    return experts


def places_of(r: Record, name: str) -> list[int]:
    """The ids of a stack's places."""
    places = core(r.weights[name].fields[0])
    return places.flatten().tolist()
