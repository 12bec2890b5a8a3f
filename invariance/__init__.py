"""Exact changes of basis of transformer language models, and compression by slicing them."""

import logging
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING


def publish() -> None:
    """Give the package its public names, and make its model type known to transformers.

    What libraries say as they are imported, of kernels that this machine cannot load, concerns nobody here.
    """
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        from . import api
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    globals().update({name: getattr(api, name) for name in api.__all__})


def _commanded() -> bool:
    """Whether this process is `invariance` or `python -m invariance`, which publishes when it needs to."""
    if sys.argv[:1] == ["-m"]:  # so it is while the module to run is looked for
        return ("-m", "invariance") in pairwise(sys.orig_argv)
    return Path(*sys.argv[:1]).stem == "invariance"


# Torch and transformers take seconds to import, and `invariance --help` needs neither; its commands publish when they
# begin. No other program goes by that name: it would shadow the package.
if TYPE_CHECKING:
    from .api import *  # noqa: F403
elif not _commanded():
    publish()
