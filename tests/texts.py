"""A recipe in which every key is on a line of its own, edits of it, and what a refused text is told."""

from __future__ import annotations

import pytest

from invariance.core.errors import InputError
from invariance.recipe.recipe import parse_recipe

GOOD = """\
# A recipe in which every key is on a line of its own.
model: some/model
calibrate:
  data: wikitext2
  sequences: 64
  tokens: 512
order: oneshot
budget:
  parameters: 0.8
seed: 1
steps:
  - spaces: residual
    segments: stage
    slice_head: false
    rotate:
      pca: {of: normed}
    select:
      uniform:
        keep: 0.75
        multiple_of: 8
    slice: truncate
  - spaces: [mlp, "vo.*"]
    rotate: identity
    select: {uniform: {multiple_of: 2}}
    slice: {least_squares: {ridge: 0.01}}
evaluate:
  - perplexity:
      data: wikitext2
      split: validation
"""


def edited(old: str, new: str) -> str:
    assert GOOD.count(old) >= 1, old
    return GOOD.replace(old, new, 1)


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    return str(caught.value)
