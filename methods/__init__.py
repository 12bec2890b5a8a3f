"""The methods that ship. Importing this package registers them, as an entry point of the group `invariance.methods`."""

from . import (
    global_energy,
    hadamard,
    head_svd,
    identity,
    least_squares,
    pca,
    permute,
    random_orthogonal,
    truncate,
    uniform,
)

__all__ = [
    "global_energy",
    "hadamard",
    "head_svd",
    "identity",
    "least_squares",
    "pca",
    "permute",
    "random_orthogonal",
    "truncate",
    "uniform",
]
