"""Declarations read off models: a small one of a config is run once, and what was read of it is proven on it."""

from .kept import read

__all__ = ["read"]
