"""Tiny models of any type of the installed transformers: default configs made small by rules, with random weights."""

from .build import Tiny, random_weights, tiny, untie
from .shrink import shrunk

__all__ = ["Tiny", "random_weights", "shrunk", "tiny", "untie"]
