"""The command line: one file a group of commands."""

from .commands import main

__all__ = ["main"]
