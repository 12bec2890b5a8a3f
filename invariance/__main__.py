"""`python -m invariance` is the command `invariance`."""

from .cli import main

main()
