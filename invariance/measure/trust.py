"""What task files may do: nothing, unless the person at the command line says so; their templates never reach Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..core.errors import InputError

_TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusting(trusted: bool = True) -> Iterator[None]:
    """Whether task files of one's own are read within the block. No recipe can say so: recipes come from strangers."""
    token = _TRUSTED.set(trusted)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def check_trusted(name: str, where: str) -> None:
    """Raises InputError for a task file that nobody has vouched for."""
    if not _TRUSTED.get():
        raise InputError(
            f"{where}: task file {name}: such a file can run any program (`!function`, metrics, templates). Read it, then say "
            "--trust-task-code on the command line; or take a task that ships with lm-eval."
        )


@contextmanager
def sandboxed() -> Iterator[None]:
    """Templates of lm-eval's tasks see their row and nothing else: no attributes that lead to Python's own objects."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    whole = utils.env
    utils.env = ImmutableSandboxedEnvironment(
        loader=whole.loader,
        undefined=whole.undefined,
        keep_trailing_newline=whole.keep_trailing_newline,
    )
    utils.env.filters |= whole.filters
    try:
        yield
    finally:
        utils.env = whole
