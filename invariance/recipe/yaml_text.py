"""From text to a tree of values that know where they stand; hostile, too long and ambiguous text is refused."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from ..core.errors import InputError, did_you_mean
from ..core.paths import check_regular

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 2**20, 10_000, 32  # of a recipe's text, its aliases expanded
TEXT_TAGS = {
    f"tag:yaml.org,2002:{t}" for t in ("str", "timestamp", "merge", "value")
}  # dates, << and = are words
SAFE_TAGS = TEXT_TAGS | {
    f"tag:yaml.org,2002:{t}" for t in ("null", "bool", "int", "float", "seq", "map")
}


@dataclasses.dataclass
class Located:
    """A value and where it stands: a scalar, or a mapping or list of further located values."""

    value: Any
    where: str  # "path:line", or the flag that set it
    line: int = 0

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return (
            [child.plain() for child in self.value] if isinstance(self.value, list) else self.value
        )

    def child(self, key: str | int) -> Located | None:
        if isinstance(self.value, list):
            return self.value[key] if isinstance(key, int) and key < len(self.value) else None
        return self.value.get(key) if isinstance(self.value, dict) else None

    def flag(self) -> str | None:
        """The flag that set this value or one inside it, if one did."""
        if self.where.startswith("--set"):
            return self.where
        children = self.value.values() if isinstance(self.value, dict) else self.value
        flags = (c.flag() for c in children) if isinstance(self.value, dict | list) else ()
        return next((f for f in flags if f is not None), None)

    def put(self, key: str | int, child: Located) -> None:
        if isinstance(self.value, list) and key == len(self.value):
            self.value.append(child)
        else:
            self.value[key] = child


def safe_yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False
    return yaml


def written(value: Any) -> str:
    """Plain data as YAML in blocks, in the order it has."""
    yaml, stream = safe_yaml(), io.StringIO()
    yaml.default_flow_style, yaml.width = False, 4096
    yaml.representer.sort_base_mapping_type_on_output = False
    yaml.dump(value, stream)
    return stream.getvalue()


def parse(text: str, where: Callable[[int], str]) -> Located | None:
    """The only document in the text, or None if there is none. ``where`` names a line, counted from 1."""
    yaml, depth, line = safe_yaml(), 0, 1
    try:
        for count, event in enumerate(yaml.parse(text)):  # a stream of events: nothing recurses yet
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            line = event.start_mark.line + 1
            if depth > MAX_DEPTH or count > 3 * MAX_VALUES:
                raise InputError(
                    f"{where(line)}: too deeply nested or too long for a recipe. Is it the right file?"
                )
        root = yaml.compose(text)
        return (
            None if root is None else _Builder(where, yaml.constructor.construct_object).build(root)
        )
    except MarkedYAMLError as e:
        mark, problem = (
            e.problem_mark or e.context_mark,
            str(e.problem or e.context).removeprefix("but "),
        )
        hints = {
            r"\t": "Indent with spaces, not tabs",
            "another document": "Put one recipe in a file",
        }
        hint = next(
            (hints[k] for k in hints if k in problem), "Check quotes, brackets and indentation"
        )
        raise InputError(
            f"{where(mark.line + 1 if mark else 1)}: not YAML: {problem}. {hint}."
        ) from None
    except YAMLError as e:  # a character that YAML does not admit
        at = where(text.count("\n", 0, getattr(e, "position", 0)) + 1)
        raise InputError(f"{at}: not YAML: {first_line(e)}. Recipes are plain text.") from None
    except (
        ValueError,
        OverflowError,
        AssertionError,
    ) as e:  # escapes beyond Unicode, odd directives
        raise InputError(f"{where(line)}: not YAML: {e}. Check escapes.") from None


def read_text(path: str | Path, what: str = "recipe") -> str:
    """The text of a recipe's file, or of another one as short. Raises InputError."""
    path = Path(path)
    check_regular(path, "YAML file")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise InputError(
                f"{path}: larger than 1 MiB; a {what} takes a page. Is it the right file?"
            )
        return raw.decode("utf-8")
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise InputError(f"{path}: no such file{near}") from None
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise InputError(
            f"{path}:{line}: not UTF-8 text. Save it as UTF-8, or name another file."
        ) from None
    except (OSError, ValueError) as e:
        raise InputError(
            f"{path}: {getattr(e, 'strerror', e)}. Give the path of a YAML file."
        ) from None


def parse_mapping(text: str, where: str, what: str, least: str) -> Located:
    """The mapping that a recipe is, or something else that is one. Raises InputError."""
    root = parse(text, lambda line: f"{where}:{line}")
    if root is None or root.value is None:
        raise InputError(f"{where}:1: empty. Write at least {least}.")
    if not isinstance(root.value, dict):
        raise InputError(
            f"{root.where}: got {show(root.value)}, but a {what} is a mapping of keys to values."
        )
    return root


@dataclasses.dataclass
class _Builder:
    """Makes a located tree of a YAML node, once per place where an alias repeats it."""

    where: Callable[[int], str]
    read: Callable[[Any], Any]  # a number, truth value or null from its node
    count: int = 0

    def build(self, node: Any, depth: int = 1) -> Located:
        line = node.start_mark.line + 1
        at = self.where(line)
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            raise InputError(
                f"{at}: aliases expand to too many values. Write the recipe without them."
            )
        if node.tag not in SAFE_TAGS:
            raise InputError(f"{at}: the tag {node.tag}. Recipes are plain data; remove the tag.")
        if isinstance(node, SequenceNode):
            return Located([self.build(item, depth + 1) for item in node.value], at, line)
        if isinstance(node, MappingNode):
            return Located(self.entries(node, depth), at, line)
        try:
            return located(node.value if node.tag in TEXT_TAGS else self.read(node), at, line)
        except (
            ValueError,
            LookupError,
        ):  # a tag that does not fit, an integer beyond Python's limit
            raise InputError(
                f"{at}: {show(node.value)} is no value of its type. Write another."
            ) from None

    def entries(self, node: MappingNode, depth: int) -> dict[str, Located]:
        entries: dict[str, Located] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            at = self.where(line)
            if not isinstance(key, ScalarNode) or key.tag not in TEXT_TAGS:
                raise InputError(
                    f"{at}: a key that is not a word. Keys are names, such as `model`."
                )
            if key.value in entries:
                first = entries[key.value].line
                raise InputError(
                    f"{at}: the key '{key.value}' stands twice, first on line {first}. Keep one."
                )
            entries[key.value] = dataclasses.replace(
                self.build(item, depth + 1), where=at, line=line
            )
        return entries


def located(value: Any, where: str, line: int = 0, depth: int = 1) -> Located:
    """Plain data as a tree, all of it at one place."""
    if depth > MAX_DEPTH:
        raise InputError(f"{where}: too deeply nested for a recipe.")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: {value} is not a finite number. Write one.")
    if isinstance(value, Mapping):
        value = {str(key): located(item, where, line, depth + 1) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        value = [located(item, where, line, depth + 1) for item in value]
    return Located(value, where, line)


def show(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = (
        "nothing"
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else repr(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."


def first_line(e: Exception) -> str:
    return str(e).partition("\n")[0] or type(e).__name__
