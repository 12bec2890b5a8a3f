"""Which column is read: never an id in place of a chat, and never one that nobody named."""

from __future__ import annotations

from typing import Any

import pytest
from folders import tokenizer

from invariance.core.errors import InputError
from invariance.io.columns import read_rows, split_column

CHAT = [{"role": "user", "content": "The people"}, {"role": "assistant", "content": "are many"}]
SHARED = [{"from": "human", "value": "The people"}, {"from": "gpt", "value": "are many"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
WRITTEN = "<user> The people\n<assistant> are many\n"


def chatting() -> Any:
    made = tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize(("name", "turns"), [("messages", CHAT), ("conversations", SHARED)])
def test_chats_go_through_the_template_and_ids_are_not_read(name: str, turns: Any) -> None:
    rows = [{"id": "e3e7", name: turns}] * 3
    assert list(read_rows(rows, None, chatting(), "here")) == [WRITTEN] * 3
    with pytest.raises(InputError, match="no chat template"):
        list(read_rows(rows, None, tokenizer(), "here"))


ROWS: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "text before all": ({"id": "x", "text": "a", "messages": CHAT}, None, "a"),
    "known": ({"id": "x", "content": "a"}, None, "a"),
    "named": ({"id": "x", "story_of_it": "a"}, "story_of_it", "a"),
    "named over text": ({"text": "b", "other": "a"}, "other", "a"),
}


@pytest.mark.parametrize("case", ROWS)
def test_the_column_that_is_meant_is_read(case: str) -> None:
    row, column, text = ROWS[case]
    assert list(read_rows([row], column, None, "here")) == [text]


REFUSED: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "one that nobody named": (
        {"id": "x"},
        None,
        r"which column is the text.*rows\.jsonl\?column=id",
    ),
    "two that could be": ({"content": "a", "body": "b"}, None, "'content' and 'body' both"),
    "one that is not there": ({"text": "a"}, "body", "no column 'body' among text"),
    "a number": ({"text": 7}, None, "row 1: not a text stream: column 'text' holds 7"),
    "turns without words": ({"messages": [{"role": "user"}]}, None, "a turn without 'value'"),
    "turns that are none": ({"messages": ["x"]}, None, "a turn without"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_cannot_be_read_are_refused(case: str) -> None:
    row, column, says = REFUSED[case]
    with pytest.raises(InputError, match=says):
        list(read_rows([row], column, chatting(), "here"))


def test_a_column_is_named_behind_the_data() -> None:
    assert split_column("a/b.jsonl?column=body") == ("a/b.jsonl", "body")
    assert split_column("owner/name:config") == ("owner/name:config", None)
