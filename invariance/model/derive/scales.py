"""Scales and signs: what the linear equations between coordinates leave free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from .ids import Equation, Ids

_LARGEST = 3000  # roots in one component; beyond that its scales stay 1

Component = tuple[tuple[int, ...], np.ndarray]  # roots, and a basis of what is free


@dataclass(frozen=True, eq=False)
class Scales:
    """Free scales by component of linked roots.

    logs: (roots, basis): log scales of the roots are any combination of the basis's columns.
    signs: (roots, basis): signs, 0 or 1, are any sum of the basis's rows modulo 2.
    """

    logs: tuple[Component, ...]
    signs: tuple[Component, ...]

    @property
    def free_scales(self) -> int:
        return sum(basis.shape[1] for _, basis in self.logs)

    @property
    def free_signs(self) -> int:
        return sum(len(basis) for _, basis in self.signs)

    def draw(self, rng: np.random.Generator) -> dict[int, tuple[float, int]]:
        """Random (log scale, sign bit) of every root that is free."""
        logs: dict[int, float] = {}
        bits: dict[int, int] = {}
        for roots, basis in self.logs:
            v = basis @ rng.uniform(-1, 1, basis.shape[1])
            v = 0.7 * v / max(1.0, float(np.abs(v).max()))
            logs.update(zip(roots, map(float, v), strict=True))
        for roots, basis in self.signs:
            drawn = rng.integers(0, 2, len(basis)) @ basis % 2
            bits.update(zip(roots, map(int, drawn), strict=True))
        return {r: (logs.get(r, 0.0), bits.get(r, 0)) for r in logs.keys() | bits.keys()}


def solve(ids: Ids, carried: Iterable[int]) -> Scales:
    """The free scales of the coordinates that weights carry."""
    equations = reduced(ids)
    links = Links()
    for equation, _ in equations:
        first, *rest = equation
        for a in rest:
            links.join(first, a)
    members, rows = defaultdict(set), defaultdict(list)
    for a in carried:
        r = ids.scale(a)[0]
        if r not in ids.units:
            members[links.root(r)].add(r)
    for equation, domain in equations:
        g = links.root(next(iter(equation)))
        rows[g].append((equation, domain))
        members[g] |= equation.keys()
    logs, signs = [], []
    known: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {}
    for g, group in members.items():
        roots = tuple(sorted(group))
        if len(roots) > _LARGEST:
            continue
        at = {a: i for i, a in enumerate(roots)}
        system = sorted((tuple(sorted((at[a], k) for a, k in e.items())), d) for e, d in rows[g])
        key = (len(roots), tuple(system))
        if key not in known:
            known[key] = free(system, len(roots))
        real, binary = known[key]
        if real.shape[1]:
            logs.append((roots, real))
        if len(binary):
            signs.append((roots, binary))
    return Scales(tuple(logs), tuple(signs))


def reduced(ids: Ids) -> list[Equation]:
    """Equations between roots, without those whose scale is 1."""
    out: list[Equation] = []
    for equation, domain in ids.equations:
        e: dict[int, int] = {}
        for a, k in equation.items():
            r, sign = ids.scale(a)
            e[r] = e.get(r, 0) + k * sign
        e = {a: k for a, k in e.items() if k and a not in ids.units}
        if e:
            out.append((e, domain))
    return out


class Links:
    """Union and find over whatever is linked."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def root(self, a: int) -> int:
        parent = self._parent
        while parent.setdefault(a, a) != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        return a

    def join(self, a: int, b: int) -> None:
        self._parent[self.root(b)] = self.root(a)


def free(system: list[tuple], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Null spaces of a component's equations: over the reals for logs, modulo 2 for signs."""
    real = [row for row, domain in system if domain in ("both", "log")]
    binary = [row for row, domain in system if domain in ("both", "sign")]
    M, G = np.zeros((len(real), n)), np.zeros((len(binary), n), dtype=np.uint8)
    for matrix, rows in ((M, real), (G, binary)):
        for i, row in enumerate(rows):
            for j, k in row:
                matrix[i, j] = k if matrix is M else k % 2
    return null_space(M), null_space_mod2(G)


def null_space(M: np.ndarray) -> np.ndarray:
    """Columns that span {v: M v = 0}."""
    if not len(M):
        return np.eye(M.shape[1])
    _, s, vt = np.linalg.svd(M)
    rank = int((s > 1e-9 * max(1.0, s.max(initial=0))).sum())
    basis = vt[rank:].T.copy()
    basis[np.abs(basis) < 1e-12] = 0
    return basis


def null_space_mod2(G: np.ndarray) -> np.ndarray:
    """Rows that span {v: G v = 0 mod 2}."""
    G, n, pivots, r = G.copy(), G.shape[1], [], 0
    for c in range(n):
        k = next((i for i in range(r, len(G)) if G[i, c]), None)
        if k is None:
            continue
        G[[r, k]] = G[[k, r]]
        others = G[:, c].astype(bool)
        others[r] = False
        G[others] ^= G[r]
        pivots.append(c)
        r += 1
    unbound = [c for c in range(n) if c not in set(pivots)]
    out = np.zeros((len(unbound), n), dtype=np.int64)
    for k, c in enumerate(unbound):
        out[k, c] = 1
        out[k, pivots] = G[: len(pivots), c]
    return out
