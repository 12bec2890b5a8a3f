"""The choice of a run's widths: by energies of bases, the influence of blocks, and losses on held-out tokens."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping

import torch

from ..calibrate.statistic import Statistic
from ..core.change import Change
from ..io.data import Tokens
from .bases import Bases, Cuts
from .calibration import timed
from .demand import Unit, Widths
from .heldout import HeldOut
from .plan import Plan


class Choosing:
    """Chooses widths for a plan once its bases are fitted, and counts what selectors that measure ask for."""

    def __init__(self, bases: Bases, held: Tokens | None) -> None:
        self.bases, self.plan, self.calibration = bases, bases.plan, bases.calibration
        self.held = held  # the tokens that no basis has seen, where a selector measures losses
        self.search: dict[str, float] | None = None

    def influence(self) -> list[float] | None:
        """1 - E[cos(stream into, stream out of)] of every block, where a selector asks for it."""
        keys = [(p, Statistic.COSINE) for p in self.plan.compared]
        known = self.calibration.shelf.get(keys).known if keys else {}
        return [1 - known[key].mean.item() for key in keys] if keys else None

    def narrower(self, influence: list[float] | None, widest: Widths) -> dict[float, Widths]:
        """The widths of the nested members, each within those of the next wider one."""
        found, within = dict[float, Widths](), widest
        for share, plan in self.plan.narrower().items():
            within = self.allocate(influence, plan, within)
            plan.check_attention(within)
            found[share] = within
        return found

    def allocate(
        self, influence: list[float] | None, plan: Plan | None = None, within: Widths | None = None
    ) -> Widths:
        """The widths that a plan, by default the run's own, allots to the bases that there are."""
        loss = None if self.held is None else self.held_out(self.held)
        start = time.perf_counter()
        with timed(self.calibration.seconds, "select"):
            widths = (plan or self.plan).allocate(self.bases.spectra, loss, influence, within)
        if loss is not None:
            counts = {"evaluations": len(loss.losses), "measured": loss.measured}
            spent = {**counts, "seconds": round(time.perf_counter() - start, 3)}
            before = self.search or {}
            self.search = {key: value + before.get(key, 0) for key, value in spent.items()}
        assert widths is not None
        return widths

    def held_out(self, tokens: Tokens) -> HeldOut:
        """Losses on tokens of what widths would leave, kept beside the moments."""
        store, path = self.calibration.kept(), None
        calibrate = self.plan.recipe.calibrate
        assert calibrate is not None
        if store is not None:
            methods = [
                [
                    *u.members,
                    u.rotate.spec(),
                    u.slice and u.slice.spec(),
                    *([] if u.rank is None else [u.rank]),
                ]
                for u in self.plan.units
            ]
            identity = json.dumps([tokens.digest(), self.plan.recipe.tie, methods])
            hashed = hashlib.sha256(identity.encode()).hexdigest()[:32]
            path = store.folder / f"losses.{hashed}.json"

        def cut(widths: Mapping[Unit, int]) -> dict[str, Change]:
            cuts = Cuts(self.bases, {u.space.name: k for u, k in widths.items()})
            return cuts.of(m for u in widths for m in u.members)

        model = self.calibration.parts.whole(torch.float32)
        units, batch = self.plan.units, calibrate.batch
        layout, progress = self.calibration.layout, self.calibration.progress
        return HeldOut(model, layout, units, cut, tokens, batch, progress, path)
