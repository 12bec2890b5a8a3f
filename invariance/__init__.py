"""Exact changes of basis of transformer language models, and compression by slicing them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING


def publish() -> None:
    """Give the package its public names, and make its model type known to transformers."""
    from . import api

    globals().update({name: getattr(api, name) for name in api.__all__})


# Torch and transformers take seconds to import, and `invariance --help` needs neither; its commands publish when they
# begin. No other program goes by that name: it would shadow the package.
if TYPE_CHECKING:
    from .api import *  # noqa: F403
elif Path(*sys.argv[:1]).stem != "invariance" and sys.orig_argv[1:3] != ["-m", "invariance"]:
    publish()
