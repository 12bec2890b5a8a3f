"""A report with every part filled, and a reader of HTML pages that checks their tags."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

import pytest

NASTY = '<script>alert("1")</script> & [red]'


DEPTH = 30


VOID = {"meta", "link", "br", "hr", "img", "input"}


Spectra = dict[str, list[float]]


def _falling(d: int, rate: float) -> list[float]:
    return [math.exp(-rate * n / d) for n in range(d)]


@pytest.fixture
def report() -> dict[str, Any]:
    points = [f"x.{i}.{s}" for i in range(DEPTH) for s in (0, 1)]
    dims = {p: 576 for p in (*points, f"x.{DEPTH}.0")} | {f"mlp.{i}": 1536 for i in range(DEPTH)}
    kept = (
        {p: 432 for p in points}
        | {f"x.{DEPTH}.0": 576}
        | {f"mlp.{i}": 1000 + 8 * i for i in range(DEPTH)}
    )
    return {
        "version": "0.1.0",
        "model": {
            "name": "a/b",
            "family": "llama",
            "exported_as": "mistral",
            "stock": True,
            "why_not_stock": None,
        },
        "output": "runs/a run",
        "recipe": {
            "model": "a/b",
            "steps": [{"spaces": ["residual"], "rotate": {"pca": {"of": "raw"}}}],
        },
        "parameters": {
            "dense": {
                "total": 134_515_008,
                "embedding": 28_311_552,
                "blocks": 106_202_880,
                "shortcuts": 0,
                "head": 576,
            },
            "sliced": {
                "total": 107_612_006,
                "embedding": 21_233_664,
                "blocks": 75_000_000,
                "shortcuts": 11_378_342,
                "head": 0,
            },
        },
        "flops_per_token": {"dense": 268_900_000, "sliced": 215_120_000},
        "kv_bytes_per_token": {"dense": 23040, "sliced": 17280},
        "perplexity": {"sotu": {"dense": 45.5, "sliced": 78.75, "recovered": 60.5, "tokens": 8176}},
        "exactness": {
            "relative_error": 4.1e-14,
            "tolerance": 7e-12,
            "negative_control": 0.87,
            "spaces": 91,
            "passed": True,
        },
        "widths": kept,
        "dims": dims,
        "kinds": {name: "residual" if name.startswith("x.") else "mlp" for name in dims},
        "tokens_per_second": {"dense": 812.0, "sliced": 903.0},
        "samples": [
            {
                "prompt": "The people",
                "dense": " have a history",
                "sliced": " have been",
                "recovered": " have seen",
            }
        ],
        "recover": {
            "weights": "lora",
            "trained_parameters": 2_500_000,
            "tokens": 262_144,
            "best_step": 90,
            "steps": 128,
            "tokens_per_second": 310.5,
            "held_out": {"before": 80.25, "after": 61.5, "tokens": 8192},
            "curve": [
                {"step": s, "held_out_loss": loss}
                for s, loss in ((0, 4.385), (64, math.inf), (90, 4.119))
            ],
        },
        "seconds": {"calibrate": 96.4, "fit": 31.0},
        "peak_memory_bytes": 3 * 2**30,
        "versions": {"python": "3.11.2", "torch": "2.9.0"},
    }


class Page(HTMLParser):
    """Every start tag with its attributes, and the text that a reader sees; raises where tags do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.said)
