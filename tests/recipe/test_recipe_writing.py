"""Recipes as they are written: what is read can be written and read again, as text and as plain data."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from texts import GOOD

from invariance.core.errors import InputError
from invariance.method.interfaces import find
from invariance.recipe.recipe import Recipe, parse_recipe

WORDS = st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12
) | st.sampled_from(
    [
        "null",
        "yes",
        "1e3",
        "0x1f",
        "2024-01-01",
        "- a",
        "a: b",
        "*a",
        "!x",
        "'",
        '"',
        "#",
        " ",
        "a\nb",
        "=",
        "<<",
        "~",
    ]
)
COUNTS = st.integers(2, 2**53)
DATA = {
    "data": WORDS,
    "sequences": st.none() | COUNTS,
    "tokens": st.none() | COUNTS,
    "split": WORDS,
    "batch": COUNTS,
}
METHOD = {
    "rotate": st.sampled_from(
        ["pca", "identity", {"pca": {"of": "normed"}}, {"random_orthogonal": {"seed": 3}}]
    ),
    "select": st.sampled_from(["global_energy", {"uniform": {"width": 3}}])
    | st.floats(1e-12, 1).map(lambda keep: {"uniform": {"keep": keep}}),
    "slice": st.floats(0, 0.5).map(lambda ridge: {"least_squares": {"ridge": ridge}})
    | st.just("truncate"),
}
STEPS = st.fixed_dictionaries(
    {"spaces": st.sampled_from(["residual", ["x.0.1", "x.1.*"]]), "select": METHOD["select"]},
    optional={
        "segments": st.sampled_from(["global", "block", "stage", {"every": 4}]),
        "slice_head": st.booleans(),
        "rotate": METHOD["rotate"],
        "slice": METHOD["slice"],
    },
)


def without_idle_budget(data: dict[str, Any]) -> dict[str, Any]:
    """The recipe, its budget gone where no step spends it."""
    spent = any(step["select"] == "global_energy" for step in data["steps"])
    return {key: value for key, value in data.items() if key != "budget" or spent}


RECIPES = st.fixed_dictionaries(
    {
        "model": WORDS,
        "calibrate": st.fixed_dictionaries(
            DATA, optional={"dtype": st.sampled_from(["auto", "float32"])}
        ),
        "budget": st.fixed_dictionaries({"parameters": st.floats(1e-300, 1)}),
        "steps": st.lists(STEPS, min_size=1, max_size=3),
    },
    optional={
        "order": st.sampled_from(["oneshot", "sequential"]),
        "tie": st.sampled_from(["keep", "untie"]),
        "seed": st.integers(0, 2**63 - 1),
        "evaluate": st.lists(
            st.fixed_dictionaries({"perplexity": st.fixed_dictionaries({**DATA, "name": WORDS})}),
            max_size=2,
            unique_by=lambda e: e["perplexity"]["name"],
        ),
    },
).map(without_idle_budget)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(RECIPES)
def test_what_is_read_can_be_written_and_read_again(data: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(data)
    assert parse_recipe(recipe.to_yaml()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_dict({**data, "model": data["model"] + "x"}) != recipe
    for key, value in data.items():
        if key in ("model", "order", "tie", "seed"):
            assert getattr(recipe, key) == value


def test_a_recipe_is_written_in_full_and_in_the_order_of_its_fields() -> None:
    written = parse_recipe(GOOD).to_dict()
    assert written["evaluate"] == [
        {"perplexity": {"data": "wikitext2", "split": "validation", "batch": 8}}
    ]
    assert list(written) == [
        "model",
        "calibrate",
        "order",
        "refit",
        "budget",
        "stock",
        "tie",
        "seed",
        "steps",
        "evaluate",
    ]
    assert written["steps"][1] == {
        "spaces": ["mlp", "vo.*"],
        "segments": "global",
        "slice_head": True,
        "rotate": "identity",
        "select": {"uniform": {"multiple_of": 2}},
        "slice": {"least_squares": {"ridge": 0.01}},
    }
    assert (
        parse_recipe(GOOD)
        .to_yaml()
        .startswith("model: some/model\ncalibrate:\n  data: wikitext2\n")
    )


def test_from_dict_refuses_what_text_would_be_refused_for() -> None:
    nested: Any = []
    for _ in range(3000):
        nested = [nested]
    steps = [{"spaces": "mlp"}]
    for data, told in [
        (
            {"model": "m", "steps": steps, "sead": 1},
            "<recipe>: sead: unknown key 'sead'; did you mean 'seed'?",
        ),
        ({"model": "m", "steps": steps, "seed": float("nan")}, "not a finite number"),
        ({"model": nested, "steps": steps}, "too deeply nested"),
        ({"model": "m", "steps": steps, 1: 2}, "unknown key '1'"),
        (
            {"model": "m", "steps": [{"spaces": "mlp", "rotate": {"pca": {"of": object()}}}]},
            "steps.0.rotate.pca",
        ),
    ]:
        with pytest.raises(InputError) as caught:
            Recipe.from_dict(data)
        assert told in str(caught.value)


def test_a_recipe_is_immutable_and_takes_live_methods() -> None:
    pca = find("rotate", "pca")(of="normed")
    recipe = Recipe.from_dict(
        {"model": "m", "calibrate": {"data": "d"}, "steps": [{"spaces": "mlp", "rotate": pca}]}
    )
    assert recipe.steps[0].rotate is pca
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    assert hash(recipe) == hash(Recipe.from_dict(recipe.to_dict()))
