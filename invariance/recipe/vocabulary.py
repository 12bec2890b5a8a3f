"""The part of a recipe that says how the rows of rare tokens are stored."""

from __future__ import annotations

from ..core.parts import Count, Part

# The comment that ends a field's line is its description, in messages and in the JSON Schema.


class Vocabulary(Part):
    """The rows of all tokens but the first, which byte-pair vocabularies begin with their frequent ones, as two factors."""

    common: Count  # how many of the first tokens keep rows of their own, a whole number from 1
    rank: Count  # how many directions the rows of the others share, a whole number from 1
