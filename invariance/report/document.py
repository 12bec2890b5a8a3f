"""What report.json holds, as types. Whatever shows a report reads it through these; a damaged file is refused by key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .units import Number, Show, count, fine, milliseconds, plain, rate, ratio, size

SIDES = {
    "model": "model",
    "dense": "dense",
    "sliced": "sliced",
    "recovered": "recovered",
    "dense_quantized": "dense, quantised",
    "quantized": "quantised",
}  # the models that a report measures, the reference first: in the file, and in words
T = TypeVar("T")


def _nothing(value: Any) -> Any:
    return None if value == {} else value


class Part(BaseModel):
    """A part of a report: keys of other versions are passed over, values must be of their kind."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Pair(Part, Generic[T]):
    """Of the dense model, and of the sliced one."""

    dense: T | None = None
    sliced: T | None = None


class Sides(Pair[T], Generic[T]):
    """Of every model that was measured."""

    model: T | None = None
    recovered: T | None = None
    dense_quantized: T | None = None
    quantized: T | None = None

    @property
    def known(self) -> dict[str, T]:
        return {side: found for side in SIDES if (found := getattr(self, side)) is not None}


@dataclass(frozen=True)
class Shown:
    """On a key of a report: it is a row of every table of costs, with this name and in this unit."""

    name: str
    show: Show


@dataclass(frozen=True)
class Row:
    """One quantity of the dense and of the sliced model."""

    name: str
    dense: Number
    sliced: Number
    show: Show
    part: bool = False  # of the row above
    largest: Number = None  # whose unit it is shown in

    @property
    def cells(self) -> list[str]:
        values = (self.dense, self.sliced)
        top = self.largest or max((v for v in values if v is not None), default=None)
        name = f"  {self.name}" if self.part else self.name
        return [name, *(self.show(v, top) for v in values), ratio(*values)]


class Mean(Part):
    value: Number = None
    standard_error: Number = None


class Perplexity(Sides[int | float]):
    tokens: Number = None
    window: int | None = None
    stride: int | None = None
    extra_loss: dict[str, Mean] = {}


class Within(Part):
    tokens: int
    kl: Number = None
    kl_standard_error: Number = None
    agreement: Number = None
    extra_loss: Number = None
    extra_loss_standard_error: Number = None
    first: int = Field(0, alias="from")
    last: int = Field(0, alias="to")
    window: int | None = None
    positions: list[Within] = []


class Divergence(Sides[Within]):
    reference: str


class Difference(Part):
    difference: Number = None
    standard_error: Number = None
    p: Number = None
    significant: bool | None = None


class Task(Sides[Mean]):
    task: str
    metric: str
    filter: str = "none"
    questions: int | None = None
    shots: int | str | None = None
    difference: dict[str, Difference | None] = {}


class Sample(Sides[str]):
    prompt: str


class Measured(Part):
    """What evaluations found, of a run or of models side by side."""

    perplexity: dict[str, Perplexity] = {}
    divergence: dict[str, Divergence] = {}
    tasks: list[Task] = []
    samples: list[Sample] = []


class Model(Part):
    name: str
    stock: bool
    family: str = ""
    exported_as: str = ""
    why_not_stock: str | None = None
    origin: str | None = None
    licence: str | list[str] | None = None
    misread: list[str] = []  # by which other programs, and how


class Parameters(Part):
    total: int
    embedding: int
    blocks: int
    shortcuts: int
    head: int


class Exactness(Part):
    relative_error: int | float
    tolerance: int | float = math.inf
    negative_control: Number = None
    spaces: int = 0
    passed: bool = True


class Predicted(Part):
    loss: Number = None
    by: str | None = None
    measured: Number = None
    energy: dict[str, Number] = {}


class Held(Part):
    before: Number
    after: Number
    tokens: int = 0


class Check(Part):
    step: int
    held_out_loss: Number = None


class Trained(Part):
    weights: str
    trained_parameters: int
    steps: int
    tokens: int
    best_step: int
    held_out: Held
    tokens_per_second: Number = None
    local_tokens: int | None = None
    members: dict[str, Held] = {}
    curve: list[Check] = []


class Outliers(Part):
    peak: Number = None
    largest_peak: Number = None
    kurtosis: Number = None


class Quantized(Part):
    bytes: Sides[int | float]
    rounding_error: Sides[int | float]
    outliers: dict[str, Pair[Outliers] | None] = {}
    file_bytes: Number = None


class Member(Part):
    share: int | float
    parameters: Parameters
    flops_per_token: Number = None
    kv_bytes_per_token: Number = None
    why_not_stock: str | None = None
    perplexity: dict[str, Perplexity] = {}


class Text(Part):
    calibrated: bool | None = None
    ratio: dict[str, Number] = {}


class Lost(Part):
    geometric_mean: Number = None
    worst: Number = None


class Texts(Part):
    each: dict[str, Text] = {}
    all: dict[str, Lost] = {}
    calibrated: dict[str, Lost] | None = None
    unseen: dict[str, Lost] | None = None


class Source(Part):
    name: str | None = None
    data: str
    sequences: int | None = None
    tokens: int | None = None
    start: str | None = None


class Report(Measured):
    """A run. To add a row to the tables of page, terminal, card and comparison: a key here with ``Shown``."""

    model: Model
    parameters: Pair[Parameters]
    version: str = ""
    output: str | None = None
    recipe: dict[str, Any] = {}
    flops_per_token: Annotated[Pair[int | float], Shown("FLOPs per token", count)] = Pair()
    kv_bytes_per_token: Annotated[Pair[int | float], Shown("KV cache per token", size)] = Pair()
    predicted_seconds: Annotated[Pair[int | float], Shown("predicted latency", milliseconds)] = (
        Pair()
    )
    tokens_per_second: Annotated[Pair[int | float], Shown("tokens per second", rate)] = Pair()
    predicted: Predicted = Predicted()
    texts: Texts = Texts()
    data: dict[str, list[Source]] = {}
    nested: list[Member] | None = None
    member: Number = None
    recover: Trained | None = None
    quantize: Quantized | None = None
    exactness: Annotated[Exactness | None, BeforeValidator(_nothing)] = None
    widths: dict[str, int] = {}
    dims: dict[str, int] = {}
    kinds: dict[str, str] = {}
    seconds: dict[str, int | float] = {}
    peak_memory_bytes: Number = None
    versions: dict[str, str] = {}

    def costs(self) -> list[Row]:
        """What the models cost, a line a quantity, those that were measured."""
        return [*_sizes(self.parameters), *self._shown(), *self._packed()]

    def losses(self) -> list[Row]:
        """Every perplexity, each model against its own reference."""
        rows = []
        for name, found in self.perplexity.items():
            before, title = found.dense, f"perplexity, {name}"
            rows.append(Row(title, before, found.sliced, plain))
            if found.recovered is not None:
                rows.append(Row(f"{title}, recovered", before, found.recovered, plain))
            if found.quantized is not None:
                said = f"{title}, quantised"
                rows.append(Row(said, found.dense_quantized, found.quantized, plain))
        return rows

    def outliers(self) -> list[Row]:
        """What rounding costs, and how far the largest numbers stand out before and after the change of basis."""
        if (found := self.quantize) is None:
            return []
        e = found.rounding_error
        rows = [Row("rounding error, ‖ΔW‖/‖W‖", e.dense_quantized, e.quantized, fine)]
        names = {"weights": "weights, in groups", "stream": "stream, in tokens"}
        measures = {"peak": "max/RMS", "largest_peak": "largest max/RMS", "kurtosis": "kurtosis"}
        for key, name in names.items():
            if (sides := found.outliers.get(key)) and sides.dense and sides.sliced:
                for m, said in measures.items():
                    values = (getattr(sides.dense, m), getattr(sides.sliced, m))
                    rows.append(Row(f"{said} of {name}", *values, plain))
        return rows

    def _shown(self) -> list[Row]:
        fields = type(self).model_fields.items()
        marks = [(key, m) for key, field in fields for m in field.metadata if isinstance(m, Shown)]
        rows = []
        for key, mark in marks:
            pair: Pair[int | float] = getattr(self, key)
            if pair.dense is not None or pair.sliced is not None:
                rows.append(Row(mark.name, pair.dense, pair.sliced, mark.show))
        return rows

    def _packed(self) -> list[Row]:
        if self.quantize is None:
            return []
        b = self.quantize.bytes
        name = "bytes of weights"
        return [
            Row(name, b.dense, b.sliced, size),
            Row(f"{name}, quantised", b.dense_quantized, b.quantized, size),
        ]


def _sizes(found: Pair[Parameters]) -> list[Row]:
    d, s = found.dense, found.sliced
    top = max((p.total for p in (d, s) if p is not None), default=None)

    def of(name: str) -> tuple[Number, Number]:
        return getattr(d, name, None), getattr(s, name, None)

    parts = [n for n in Parameters.model_fields if n != "total"]
    cut = [None if p is None else p.blocks + p.shortcuts for p in (d, s)]
    return [
        Row("parameters", *of("total"), count, largest=top),
        *(Row(name, *of(name), count, True, top) for name in parts),
        Row("blocks + shortcuts", cut[0], cut[1], count),
    ]
