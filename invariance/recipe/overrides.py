"""Overrides from the command line: `--set KEY=VALUE` on the tree of a recipe."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from ..core.errors import InputError
from ..method.interfaces import Method, registry
from .named_methods import METHODS, ROUND
from .yaml_text import MAX_DEPTH, Located, parse, show


def override(root: Located, assignment: str) -> None:
    """Apply one ``key=value``: set the key, its missing parents created; null removes it."""
    key, equals, text = assignment.partition("=")
    where, path = f"--set {key}", key.split(".")
    if not equals or not all(path) or len(path) > MAX_DEPTH:
        raise InputError(
            f"--set {assignment}: not KEY=VALUE. Write the key dotted, as in steps.0.rotate=pca."
        )
    new = parse(text, lambda line: where)
    if new is None:
        raise InputError(
            f"{where}: no value. Write null to remove the key, '' for an empty string."
        )
    assign(root, path, new, where)


def assign(root: Located, path: Sequence[str], new: Located, where: str) -> None:
    """Put a value at a path, its missing parents created; a value of null removes what is there."""
    node = root
    for part, following in itertools.pairwise(path):
        slot = _slot(node, part, where)
        child = node.child(slot)
        if child is None or child.value is None:
            if new.value is None:
                return
            child = Located([] if following.isdigit() else {}, where)
            node.put(slot, child)
        elif (
            part in (*METHODS, ROUND) and child.value == following
        ):  # a method's bare name, and now an option of it
            child.value = {following: Located({}, where)}
        node = child
    slot = _slot(node, path[-1], where)
    if new.value is not None:
        node.put(slot, new)
        for rival in _rivals(path):
            node.value.pop(rival, None)
    elif node.child(slot) is not None:
        del node.value[slot]
        node.where, node.line = where, 0


def _slot(node: Located, part: str, where: str) -> str | int:
    """A part of a dotted key as a key of the node, or as an index of it, at most one past the end."""
    if isinstance(node.value, dict):
        return part
    if not isinstance(node.value, list):
        hint = "Set the key above as a whole, as in steps.0.rotate={pca: {of: raw}}"
        raise InputError(
            f"{where}: {show(node.value)} stands above '{part}', and has no keys. {hint}."
        )
    n = len(node.value)
    if not re.fullmatch("[0-9]{1,5}", part) or int(part) > n:
        raise InputError(f"{where}: '{part}' is no index of {n} items. Count from 0; {n} adds one.")
    return int(part)


def _rivals(path: Sequence[str]) -> set[str]:
    """The options that go when the option at this path is set, as a method takes only one of them."""
    if len(path) != 5 or path[0] != "steps" or path[2] not in METHODS:
        return set()
    cls = registry(path[2]).get(path[3], Method)
    return {o for group in cls.alternatives if path[4] in group for o in group} - {path[4]}
