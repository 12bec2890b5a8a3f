"""`invariance families` on the command line: the page that it writes, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import invoke


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_not_its_own_page_is_refused_before_any_work(kind: str, tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    if kind == "folder":
        notes.mkdir()
    elif kind == "link":
        notes.symlink_to(tmp_path / "gone")
    else:
        notes.write_text("mine")
    status, _, err = invoke("families", "llama", "--output", notes)
    assert status == 2 and "--output" in err
    assert kind != "file" or notes.read_text() == "mine"
