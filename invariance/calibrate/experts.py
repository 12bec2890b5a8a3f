"""What each expert adds to the tokens that chose it: the norm of its output times the router's weight."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..model.described.description import Flat
from ..model.described.weightless import stored
from .moment import Moment
from .tap import PRODUCTS

SUMS = {"aten::add", "aten::add_"}  # of a bias
FACTORS = {"aten::mul", "aten::mul_"}  # by the router's weight


class Added(TorchDispatchMode):
    """Watches what comes out of the stacks of matrices by which experts write the stream, until it is weighed.

    ``norms`` and ``tokens``: of each space, per expert, the sum of g‖f(x)‖ and how many tokens chose it.
    """

    def __init__(self, model: nn.Module, flat: Flat, spaces: list[str]):
        super().__init__()
        params = stored(model)
        self.stacks: dict[int, tuple[str, Tensor]] = {}
        for space in spaces:
            for a in flat.carrying(space):
                others = [o for o in flat.of[a.parameter] if o.axis.dims != a.axis.dims]
                if any(p.writes for o in others for p in o.axis.points):
                    p = params[a.parameter]
                    self.stacks[p.untyped_storage()._cdata] = space, p
        widths = {space: flat.spaces[space].width for space in spaces}
        self.norms = {s: torch.zeros(n, dtype=torch.float64) for s, n in widths.items()}
        self.tokens = {s: torch.zeros(n, dtype=torch.float64) for s, n in widths.items()}
        self.out: tuple[Tensor, str, int] | None = None  # the last output, its space and expert

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in PRODUCTS:
            self._product(args[PRODUCTS[name] :], made)
        elif name in SUMS and self._weighed(args) is not None:
            self._follow(made)
        elif name in FACTORS and (factor := self._weighed(args)) is not None:
            self._take(made, factor)
        return made

    def _product(self, factors: Any, made: Tensor) -> None:
        for w in factors[:2]:
            found = self.stacks.get(w.untyped_storage()._cdata)
            if found is not None and w.dim() == 2:
                space, p = found
                offset = w.storage_offset() - p.storage_offset()
                self.out = made, space, offset // p.stride(0)

    def _weighed(self, args: Any) -> Tensor | None:
        """The other factor or term, where one is the last output."""
        if self.out is None or not all(isinstance(a, Tensor) for a in args[:2]):
            return None
        a, b = args[:2]
        y = self.out[0]
        for one, other in ((a, b), (b, a)):
            if one.data_ptr() == y.data_ptr() and one.shape == y.shape:
                return other  # type: ignore[no-any-return]
        return None

    def _follow(self, made: Tensor) -> None:
        assert self.out is not None
        self.out = made, *self.out[1:]

    def _take(self, made: Tensor, factor: Tensor) -> None:
        """One number a token is the router's weight; anything else scales coordinates."""
        assert self.out is not None
        if factor.numel() != len(made):
            self._follow(made)
            return
        _, space, expert = self.out
        self.out = None
        self.norms[space][expert] += made.norm(dim=-1).sum(dtype=torch.float64).cpu()
        self.tokens[space][expert] += len(made)

    def moments(self) -> dict[str, Moment]:
        """Of each space the means on the diagonal; 0 for experts that no token chose."""
        return {s: Moment(self._mean(s).diag()[None], 1) for s in self.norms}

    def _mean(self, space: str) -> Float64[Tensor, " e"]:
        return self.norms[space] / self.tokens[space].clamp_min(1)
