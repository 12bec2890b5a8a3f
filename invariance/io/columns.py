"""Which column of a table is its text: the one that is named, one that is known by its name, or a chat in its template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import InputError

MARK = "?column="  # behind a file or dataset: rows.jsonl?column=body
TEXTS = ("text", "content", "document", "article", "body", "story", "passage", "code")
CHATS = ("messages", "conversations", "conversation", "dialog")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


class Turn(BaseModel):
    """One turn of a chat, as OpenAI writes it or as ShareGPT does."""

    model_config = ConfigDict(extra="ignore")

    role: str = Field(validation_alias="from")
    content: str = Field(validation_alias="value")


def split_column(data: str) -> tuple[str, str | None]:
    """A source, and the column that is named behind it, if one is."""
    source, mark, column = data.partition(MARK)
    return source, column if mark else None


def read_rows(
    rows: Iterable[Mapping[str, Any]], column: str | None, tokenizer: Any, where: str
) -> Iterator[str]:
    """The text of each row. Raises InputError where no column can be told, or a row has none."""
    chosen = None
    for n, row in enumerate(rows, 1):
        chosen = chosen or _choose(row, column, where)
        value = row.get(chosen)
        if isinstance(value, list):
            yield _chat(value, tokenizer, f"{where}, row {n}, column '{chosen}'")
        elif isinstance(value, str):
            yield value
        else:
            fault = "NaN text stream" if value is None or value != value else "not a text stream"
            raise InputError(
                f"{where}, row {n}: {fault}: column '{chosen}' holds {value!r:.60}. Remove or repair the row."
            )


def _choose(row: Mapping[str, Any], column: str | None, where: str) -> str:
    if column is not None:
        if column not in row:
            raise InputError(
                f"{where}: no column '{column}' among {', '.join(row)}. Name one of them."
            )
        return column
    known = [name for name in (*TEXTS, *CHATS) if isinstance(row.get(name), str | list)]
    if "text" in row:
        return "text"
    if len(known) == 1:
        return known[0]
    told = f"'{known[0]}' and '{known[1]}' both could be" if known else "None is known by its name"
    raise InputError(
        f"{where}: which column is the text? {told}; there is none called 'text' among {', '.join(row)}. Name it behind the "
        f"data, as in `rows.jsonl{MARK}{next(iter(row), 'body')}`."
    )


def _chat(turns: list[Any], tokenizer: Any, where: str) -> str:
    """A chat as the model sees it, through its tokenizer's template."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{where}: a chat, and the model's tokenizer has no chat template to write it with. Give text, or a model that was "
            "made for chats."
        )
    try:
        said = [_turn(turn) for turn in turns]
    except ValidationError as e:
        key = ".".join(map(str, e.errors()[0]["loc"]))
        raise InputError(
            f"{where}: a turn without '{key}'. Give turns of role and content."
        ) from None
    try:
        return str(tokenizer.apply_chat_template(said, tokenize=False))
    except (
        Exception
    ) as e:  # templates raise what they like, for roles in an order that they do not take
        raise InputError(
            f"{where}: the chat template refuses it: {' '.join(str(e).split())[:200]}. Remove or repair the row."
        ) from None


def _turn(turn: Any) -> dict[str, str]:
    found = dict(turn) if isinstance(turn, Mapping) else {}
    for ours, theirs in (("role", "from"), ("content", "value")):
        if ours in found:
            found[theirs] = found[ours]
    made = Turn.model_validate(found)
    return {"role": ROLES.get(made.role, made.role), "content": made.content}
