"""The methods that ship. Importing this package registers them, as an entry point of the group `invariance.methods`."""

from . import (
    bias_compensation,
    fluctuation,
    global_energy,
    hadamard,
    head_svd,
    identity,
    least_squares,
    obs,
    output_aware,
    pca,
    permute,
    random_orthogonal,
    reader_weighted,
    ridge_leverage,
    truncate,
    uniform,
)

__all__ = [
    "bias_compensation",
    "fluctuation",
    "global_energy",
    "hadamard",
    "head_svd",
    "identity",
    "least_squares",
    "obs",
    "output_aware",
    "pca",
    "permute",
    "random_orthogonal",
    "reader_weighted",
    "ridge_leverage",
    "truncate",
    "uniform",
]
