"""Methods of one's own: options checked as those that ship, faults told at their step, all in the JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
from texts import refused

from invariance.core.errors import InputError
from invariance.method.interfaces import Method, Selector, registry
from invariance.recipe.named_methods import PLACES
from invariance.recipe.recipe import Recipe, parse_recipe
from invariance.recipe.schema import json_schema


class _Own(Selector):
    def allocate(self, spectra: Any, cost: Any, budget: Any) -> Any:
        return {}


@pytest.fixture
def own() -> Iterator[type[Method]]:
    """A throw-away selector with options of every sort, and one that refuses; gone from the registry afterwards."""
    before = dict(registry("select"))

    @dataclass(frozen=True)
    class Good(_Own, name="own_good"):
        """All sorts."""

        required: bool
        widths: tuple[int, ...] = (1,)  # one a block
        level: float | None = 0.5
        hidden: int = field(default=3, init=False)

    @dataclass(frozen=True)
    class Raises(_Own, name="own_raises"):
        """Refuses its option in the ways that a plugin might."""

        option: int = 0

        def __post_init__(self) -> None:
            if self.option:
                raise (InputError if self.option == 1 else TypeError)("no such thing")

    yield Good
    _restore(before)


@pytest.fixture
def faulty() -> Iterator[None]:
    """Selectors that their authors did not finish."""
    before = dict(registry("select"))

    @dataclass(frozen=True)
    class Unreadable(_Own, name="own_unreadable"):
        option: Nowhere = 0  # type: ignore[name-defined]  # noqa: F821

    class Plain(_Own, name="own_plain"):
        pass

    yield
    _restore(before)


def _restore(before: dict[str, Any]) -> None:
    registry("select").clear()  # type: ignore[attr-defined]
    registry("select").update(before)  # type: ignore[attr-defined]


def with_select(select: str) -> str:
    return f"model: m\nsteps:\n  - spaces: mlp\n    select: {select}\n"


def test_options_of_every_sort_come_and_go(own: type[Method]) -> None:
    r = parse_recipe(with_select("{own_good: {required: true, widths: [3, 4], level: null}}"))
    assert r.steps[0].select == own(required=True, widths=(3, 4), level=None)  # type: ignore[call-arg]
    assert r.to_dict()["steps"][0]["select"]["own_good"]["level"] is None
    assert Recipe.from_dict(json.loads(json.dumps(r.to_dict()))) == parse_recipe(r.to_yaml()) == r


@pytest.mark.parametrize(
    ("select", "told"),
    [
        ("own_good", "the option 'required' is missing"),
        ("{own_good: {required: 1}}", "own_good.required: got 1, but it should be a valid boolean"),
        ("{own_good: {required: true, widths: [1, 2.5]}}", "own_good.widths.1: got 2.5"),
        (
            "{own_good: {required: true, widths: 3}}",
            "own_good.widths: got 3, but it should be a list",
        ),
        ("{own_good: {required: true, hidden: 3}}", "'own_good' has no option 'hidden'"),
        ("{own_raises: {option: 1}}", "no such thing"),
        ("{own_raises: {option: 2}}", "no such thing"),
    ],
)
def test_a_wrong_option_is_told_at_its_place(own: Any, select: str, told: str) -> None:
    message = refused(with_select(select))
    assert message.startswith("r.yaml:4: steps.0.select") and told in message


@pytest.mark.parametrize(
    ("select", "told"), [("own_unreadable", "not fully defined"), ("own_plain", "dataclass")]
)
def test_a_faulty_method_is_told_at_the_step_that_names_it(
    faulty: None, select: str, told: str
) -> None:
    message = refused(with_select(select))
    assert (
        message.startswith("r.yaml:4: steps.0.select") and told in message and "\n" not in message
    )


# --- the JSON Schema


def test_the_schema_names_every_method_and_option_with_its_manual() -> None:
    schema = json.loads(json.dumps(json_schema()))
    step = schema["$defs"]["Step"]["properties"]
    for kind in ("rotate", "select", "slice"):
        names = {
            choice["const"]: choice["description"]
            for choice in step[kind]["anyOf"]
            if "const" in choice
        }
        known = {n: cls for k in PLACES.get(kind, (kind,)) for n, cls in registry(k).items()}
        assert names.keys() == known.keys() and all(names.values())
        for name, cls in known.items():
            [options] = [
                c["properties"][name]
                for c in step[kind]["anyOf"]
                if name in c.get("properties", {})
            ]
            assert options["properties"].keys() == {f.name for f in fields(cls)}
            assert options["additionalProperties"] is False
    [pca] = [
        c["properties"]["pca"] for c in step["rotate"]["anyOf"] if "pca" in c.get("properties", {})
    ]
    assert pca["properties"]["of"]["enum"] == ["raw", "normed"]


def test_the_schema_describes_every_key_and_agrees_with_the_parser() -> None:
    schema = json_schema()
    parts = [schema, *schema["$defs"].values()]
    assert all("description" in p for part in parts for p in part["properties"].values())
    assert all(part["additionalProperties"] is False for part in parts)
    assert schema["required"] == ["model", "steps"]
    assert schema["properties"]["steps"]["minItems"] == 1
    assert schema["$defs"]["Step"]["properties"]["spaces"]["anyOf"][0] == {"type": "string"}


def test_the_schema_describes_the_options_of_methods_of_ones_own(own: type[Method]) -> None:
    choices = json_schema()["$defs"]["Step"]["properties"]["select"]["anyOf"]
    [options] = [
        c["properties"]["own_good"] for c in choices if "own_good" in c.get("properties", {})
    ]
    assert options["properties"]["widths"]["description"] == "one a block"
    assert options["required"] == ["required"]


def test_the_schema_names_the_method_whose_options_it_cannot_describe(faulty: None) -> None:
    with pytest.raises(InputError, match="select method 'own_plain': options without a schema"):
        json_schema()
