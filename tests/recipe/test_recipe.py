"""Recipes as they are read: every key and its default, and every mistake told with its line."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from texts import GOOD, edited, refused

from invariance.core.errors import InputError
from invariance.method.interfaces import find
from invariance.recipe.recipe import parse_recipe
from invariance.recipe.step import Every


def test_every_key_is_read() -> None:
    r = parse_recipe(GOOD)
    assert (r.model, r.order, r.seed, r.tie) == ("some/model", "oneshot", 1, "untie")
    assert r.calibrate is not None and r.budget is not None
    assert (r.calibrate.data, r.calibrate.sequences, r.calibrate.tokens) == ("wikitext2", 64, 512)
    assert (r.calibrate.split, r.calibrate.batch, r.calibrate.dtype) == ("train", 8, "auto")
    assert r.budget.parameters == 0.8
    first, second = r.steps
    assert (first.spaces, first.segments, first.slice_head) == (("residual",), "stage", False)
    assert first.rotate == find("rotate", "pca")(of="normed")
    assert first.select == find("select", "uniform")(keep=0.75, multiple_of=8)
    assert first.slice == find("slice", "truncate")()
    assert second.spaces == ("mlp", "vo.*") and (second.segments, second.slice_head) == (
        "global",
        True,
    )
    assert second.slice == find("slice", "least_squares")(ridge=0.01)
    assert (r.evaluate[0].perplexity.split, r.evaluate[0].perplexity.label) == (
        "validation",
        "wikitext2",
    )


def test_defaults_are_the_identity_and_truncation_beside_a_selector() -> None:
    r = parse_recipe("model: m\nsteps: [{spaces: qk}, {spaces: mlp, select: {uniform: {keep: 1}}}]")
    assert r.steps[0].methods == {"rotate": find("rotate", "identity")()}
    assert r.steps[1].slice == find("slice", "truncate")()
    assert (r.calibrate, r.budget, r.evaluate) == (None, None, ())


@pytest.mark.parametrize(
    "spaces",
    [
        "residual",
        "mlp",
        "vo",
        "qk",
        "mlp.0",
        "mlp.*",
        "x.3.1",
        "x.*",
        "mlp.[0-3]",
        "*",
        "?o.1",
        "mlp.3.7",
    ],
)
def test_kinds_names_and_patterns_are_spaces(spaces: str) -> None:
    assert parse_recipe(f"model: m\nsteps: [{{spaces: '{spaces}'}}]").steps[0].spaces == (spaces,)


@pytest.mark.parametrize("spaces", ["residual", "x.3.1", "[residual, 'x.0.*']"])
def test_segments_are_for_the_residual_stream(spaces: str) -> None:
    r = parse_recipe(f"model: m\nsteps: [{{spaces: {spaces}, segments: {{every: 2}}}}]")
    assert r.steps[0].segments == Every(every=2)


def test_an_evaluation_is_called_by_its_name_or_else_by_its_data() -> None:
    evaluate = "\nevaluate: [{perplexity: {data: a}}, {perplexity: {data: a, name: b}}]"
    r = parse_recipe("model: m\nsteps: [{spaces: mlp}]" + evaluate)
    assert [e.perplexity.label for e in r.evaluate] == ["a", "b"]
    assert [e.perplexity.split for e in r.evaluate] == ["test", "test"]


MALFORMED: list[tuple[str, str, int, str]] = [
    # keys
    ("unknown key", edited("seed:", "sead:"), 10, "unknown key 'sead'; did you mean 'seed'?"),
    ("unknown required key", edited("model:", "modle:"), 2, "did you mean 'model'?"),
    ("unknown key of calibrate", edited("sequences:", "seqences:"), 5, "did you mean 'sequences'?"),
    ("unknown key of budget", edited("parameters:", "params:"), 9, "unknown key 'params'"),
    ("unknown key of a step", edited("segments:", "segment:"), 13, "did you mean 'segments'?"),
    ("unknown key of segments", edited("stage", "{evry: 2}"), 13, "did you mean 'every'?"),
    (
        "one key too many of segments",
        edited("stage", "{every: 2, from: 1}"),
        13,
        "unknown key 'from'",
    ),
    ("unknown evaluation", edited("perplexity:", "perplexty:"), 27, "did you mean 'perplexity'?"),
    ("unknown key of perplexity", edited("split: v", "splt: v"), 29, "did you mean 'split'?"),
    ("unlike any key", edited("seed:", "zzz:"), 10, "known: budget, calibrate"),
    ("no model", edited("model: some/model\n", ""), 2, "the key 'model' is missing. Give a hub id"),
    ("no steps", "model: m\nseed: 1\n", 1, "the key 'steps' is missing"),
    (
        "no data to calibrate on",
        edited("  data: wikitext2\n", ""),
        3,
        "calibrate: the key 'data' is missing",
    ),
    ("no spaces", edited("spaces: residual\n    ", ""), 12, "steps.0: the key 'spaces' is missing"),
    (
        "no data to evaluate on",
        edited("data: wikitext2\n      split", "split"),
        27,
        "'data' is missing",
    ),
    (
        "no fraction in the budget",
        edited("budget:\n  parameters: 0.8", "budget: {}"),
        8,
        "nothing is limited",
    ),
    (
        "a key twice",
        edited("seed: 1", "seed: 1\nseed: 2"),
        11,
        "'seed' stands twice, first on line 10",
    ),
    (
        "a nested key twice",
        edited("tokens: 512", "data: x"),
        6,
        "'data' stands twice, first on line 4",
    ),
    ("a key that is a number", edited("seed: 1", "1: 1"), 10, "a key that is not a word"),
    ("a key that is null", edited("seed: 1", "~: 1"), 10, "a key that is not a word"),
    ("a key that is a list", edited("seed: 1", "[a]: 1"), 10, "a key that is not a word"),
    ("a merge key", edited("seed: 1", "<<: {seed: 1}"), 10, "unknown key '<<'"),
    # scalars
    (
        "model empty",
        edited("some/model", ""),
        2,
        "model: got nothing, but it should be a valid string",
    ),
    ("model blank", edited("some/model", "''"), 2, "should have at least 1 character"),
    ("model a number", edited("some/model", "7"), 2, "got 7, but it should be a valid string"),
    ("model a list", edited("some/model", "[a]"), 2, "got a list, but it should be a valid string"),
    ("model true", edited("some/model", "true"), 2, "got true, but it should be a valid string"),
    (
        "calibrate a word",
        edited("calibrate:\n  data: wikitext2\n  sequences: 64\n  tokens: 512", "calibrate: c4"),
        3,
        "got 'c4', but it should be a mapping",
    ),
    (
        "calibrate a list",
        edited("calibrate:\n  data: wikitext2\n  sequences: 64\n  tokens: 512", "calibrate: [c4]"),
        3,
        "got a list, but it should be a mapping",
    ),
    ("data a number", edited("data: wikitext2", "data: 2"), 4, "should be a valid string"),
    ("data blank", edited("data: wikitext2", "data: ''"), 4, "should have at least 1 character"),
    ("sequences zero", edited("64", "0"), 5, "greater than or equal to 1. Give how many sequences"),
    (
        "sequences negative",
        edited("64", "-1"),
        5,
        "got -1, but it should be greater than or equal to 1",
    ),
    ("sequences a fraction", edited("64", "6.5"), 5, "got 6.5, but it should be a valid integer"),
    (
        "sequences a whole float",
        edited("64", "64.0"),
        5,
        "got 64.0, but it should be a valid integer",
    ),
    ("sequences true", edited("64", "true"), 5, "got true, but it should be a valid integer"),
    ("sequences a string", edited("64", "'64'"), 5, "got '64', but it should be a valid integer"),
    ("sequences a word", edited("64", "many"), 5, "got 'many', but it should be a valid integer"),
    ("sequences NaN", edited("64", ".nan"), 5, "nan is not a finite number"),
    ("tokens zero", edited("512", "0"), 6, "greater than or equal to 1"),
    ("batch zero", edited("tokens: 512", "batch: 0"), 6, "greater than or equal to 1"),
    (
        "batch null",
        edited("tokens: 512", "batch: null"),
        6,
        "got nothing, but it should be a valid integer",
    ),
    (
        "dtype unknown",
        edited("tokens: 512", "dtype: float16"),
        6,
        "should be 'auto', 'float32' or 'bfloat16'",
    ),
    (
        "order unknown",
        edited("oneshot", "parallel"),
        7,
        "should be 'oneshot', 'sequential' or 'dense_target'",
    ),
    (
        "order a list",
        edited("oneshot", "[oneshot]"),
        7,
        "got a list, but it should be 'oneshot', '",
    ),
    (
        "tie true",
        edited("seed: 1", "tie: true"),
        10,
        "got true, but it should be 'keep' or 'untie'",
    ),
    (
        "budget a number",
        edited("budget:\n  parameters: 0.8", "budget: 0.8"),
        8,
        "as in {parameters: 0.8}",
    ),
    ("budget zero", edited("0.8", "0"), 9, "got 0, but it should be greater than 0"),
    ("budget above one", edited("0.8", "1.5"), 9, "less than or equal to 1"),
    ("budget negative", edited("0.8", "-0.5"), 9, "greater than 0"),
    ("budget percent", edited("0.8", "80%"), 9, "got '80%', but it should be a valid number"),
    ("budget quoted", edited("0.8", '"0.8"'), 9, "got '0.8', but it should be a valid number"),
    ("budget true", edited("0.8", "true"), 9, "got true, but it should be a valid number"),
    ("budget infinite", edited("0.8", ".inf"), 9, "inf is not a finite number"),
    ("budget too large for a float", edited("0.8", "1e999"), 9, "inf is not a finite number"),
    (
        "budget never spent",
        "model: m\nbudget: {parameters: 0.5}\nsteps: [{spaces: mlp}]",
        2,
        "budget: no step spends it: none has a `select`. Add one that spends it",
    ),
    (
        "budget beside widths",
        edited("multiple_of: 2", "width: 12"),
        8,
        "budget: no step spends it: each `select` fixes its widths. Add one that spends it",
    ),
    ("seed negative", edited("seed: 1", "seed: -1"), 10, "greater than or equal to 0"),
    ("seed a float", edited("seed: 1", "seed: 1.5"), 10, "valid integer"),
    ("seed too large", edited("seed: 1", "seed: 9223372036854775808"), 10, "less than"),
    # steps
    ("steps empty", "model: m\nsteps: []\n", 2, "should have at least one item"),
    ("steps null", "model: m\nsteps:\n", 2, "got nothing, but it should be a list"),
    (
        "steps a mapping",
        "model: m\nsteps: {spaces: mlp}\n",
        2,
        "got a mapping, but it should be a list",
    ),
    (
        "a step that is a word",
        "model: m\nsteps:\n  - mlp\n",
        3,
        "steps.0: got 'mlp', but it should be a mapping",
    ),
    (
        "the second step is empty",
        "model: m\nsteps:\n  - spaces: mlp\n  -\n",
        4,
        "steps.1: got nothing",
    ),
    (
        "spaces misspelt",
        edited("spaces: residual", "spaces: residul"),
        12,
        "did you mean 'residual'?",
    ),
    ("spaces misspelt in a list", edited('"vo.*"', "\n      vq"), 23, "no space is called 'vq'"),
    (
        "spaces without a name",
        edited("spaces: residual", "spaces: mlp."),
        12,
        "no space is called 'mlp.'",
    ),
    ("spaces empty", edited("spaces: residual", "spaces: []"), 12, "at least one item"),
    ("spaces null", edited("spaces: residual", "spaces:"), 12, "got nothing"),
    ("spaces blank", edited("spaces: residual", "spaces: ''"), 12, "no space is called ''"),
    ("spaces a number", edited("spaces: residual", "spaces: 3"), 12, "got 3; write a space's kind"),
    (
        "spaces with a number",
        edited("spaces: residual", "spaces: [mlp, 3]"),
        12,
        "steps.0.spaces.1: got 3",
    ),
    ("spaces a mapping", edited("spaces: residual", "spaces: {mlp: 1}"), 12, "got a mapping"),
    ("spaces twice", edited("[mlp, ", "[mlp, mlp, "), 22, "'mlp' stands here twice"),
    ("segments unknown", edited("stage", "stages"), 13, "should be 'global', 'block' or 'stage'"),
    (
        "segments null",
        edited("stage", ""),
        13,
        "got nothing, but it should be 'global', 'block' or 'stage'",
    ),
    ("segments a number", edited("stage", "2"), 13, "{every: N}"),
    ("segments every zero", edited("stage", "{every: 0}"), 13, "steps.0.segments.every: got 0"),
    ("segments every half", edited("stage", "{every: 1.5}"), 13, "valid integer"),
    ("segments every true", edited("stage", "{every: true}"), 13, "valid integer"),
    (
        "segments off the stream",
        edited("spaces: residual", "spaces: mlp"),
        13,
        "about the residual stream alone",
    ),
    (
        "segments of a mixed step",
        edited("spaces: residual", "spaces: [residual, mlp]"),
        13,
        "has 'mlp'",
    ),
    (
        "slice_head off the stream",
        edited("rotate: identity", "slice_head: false"),
        23,
        "residual stream alone",
    ),
    (
        "slice_head a word",
        edited("false", "never"),
        14,
        "got 'never', but it should be a valid boolean",
    ),
    ("slice_head a number", edited("false", "0"), 14, "got 0, but it should be a valid boolean"),
    (
        "slice without select",
        edited("select: {uniform: {multiple_of: 2}}", ""),
        25,
        "no `select` says how much to cut",
    ),
    # methods
    (
        "rotator misspelt",
        edited("identity", "identty"),
        23,
        "no rotate method is called 'identty'; did you mean 'i",
    ),
    ("rotator misspelt, with options", edited("pca:", "pcs:"), 16, "did you mean 'pca'?"),
    (
        "selector misspelt",
        edited("uniform:", "unifrom:"),
        18,
        "no select method is called 'unifrom'; did you mean",
    ),
    (
        "slicer misspelt",
        edited("truncate", "trunkate"),
        21,
        "no slice method is called 'trunkate'; did you mean",
    ),
    (
        "a selector as a rotator",
        edited("identity", "uniform"),
        23,
        "no rotate method is called 'uniform'",
    ),
    (
        "rotator null",
        edited("rotate: identity", "rotate:"),
        23,
        "steps.1.rotate: got nothing; write a method",
    ),
    (
        "rotator a number",
        edited("identity", "3"),
        23,
        "got 3; write a method as NAME or {NAME: {OPTION: VALUE}}",
    ),
    ("rotator a list", edited("identity", "[pca]"), 23, "got a list; write a method"),
    ("rotator empty", edited("identity", "{}"), 23, "got a mapping; write a method"),
    (
        "two rotators",
        edited("      pca:", "      identity:\n      pca:"),
        17,
        "'identity' stands here already",
    ),
    (
        "options a word",
        edited("{of: normed}", "normed"),
        16,
        "got 'normed'; write options as {pca: {OPTION: VALUE}}",
    ),
    ("options a list", edited("{of: normed}", "[normed]"), 16, "got a list; write options"),
    ("option unknown", edited("of:", "off:"), 16, "'pca' has no option 'off'; did you mean 'of'?"),
    (
        "option unknown to one without",
        edited("identity", "{identity: {of: raw}}"),
        23,
        "no option 'of'; known: none",
    ),
    (
        "option outside its choices",
        edited("normed", "norm"),
        16,
        "got 'norm', but it should be 'raw' or 'normed'",
    ),
    (
        "option null",
        edited("normed", "null"),
        16,
        "steps.0.rotate.pca.of: got nothing, but it should be 'raw'",
    ),
    (
        "option above its range",
        edited("keep: 0.75", "keep: 1.5"),
        19,
        "keep must be above 0 and at most 1",
    ),
    ("option at zero", edited("keep: 0.75", "keep: 0"), 19, "keep must be above 0 and at most 1"),
    ("option NaN", edited("keep: 0.75", "keep: .nan"), 19, "nan is not a finite number"),
    (
        "option a string",
        edited("keep: 0.75", "keep: '0.75'"),
        19,
        "got '0.75', but it should be a valid number",
    ),
    (
        "option true for a number",
        edited("keep: 0.75", "keep: true"),
        19,
        "got true, but it should be a valid number",
    ),
    (
        "option a float for an int",
        edited("multiple_of: 8", "multiple_of: 8.0"),
        20,
        "valid integer",
    ),
    (
        "option below its range",
        edited("multiple_of: 8", "multiple_of: 0"),
        20,
        "multiple_of must be at least 1",
    ),
    (
        "options that exclude each other",
        edited("multiple_of: 8", "width: 8"),
        20,
        "'keep' and 'width' exclude",
    ),
    (
        "moments without data",
        "model: m\nsteps:\n  - spaces: residual\n    rotate: pca\n",
        4,
        "'pca' reads moments",
    ),
    (
        "moments of a slicer",
        "model: m\nsteps:\n  - spaces: mlp\n    select: {uniform: {keep: 0.5}}\n    "
        "slice: least_squares",
        5,
        "'least_squares' reads moments",
    ),
    (
        "budget missing",
        "model: m\nsteps:\n  - spaces: mlp\n    select: global_energy\n",
        4,
        "spends a budget",
    ),
    # evaluate
    (
        "evaluate a mapping",
        edited("  - perplexity:", "    perplexity:"),
        26,
        "got a mapping, but it should be a list",
    ),
    (
        "evaluate a word",
        "model: m\nsteps: [{spaces: mlp}]\nevaluate: [perplexity]",
        3,
        "evaluate.0: got 'perplexity'",
    ),
    (
        "perplexity of nothing",
        "model: m\nsteps: [{spaces: mlp}]\nevaluate: [{perplexity: }]",
        3,
        "as in {data: ",
    ),
    (
        "perplexity of one token",
        edited("split: v", "tokens: 1 #"),
        29,
        "greater than or equal to 2",
    ),
    ("name blank", edited("split: v", "name: '' #"), 29, "at least 1 character"),
    (
        "two of a name",
        GOOD + "  - {perplexity: {data: wikitext2}}\n",
        30,
        "the report has 'wikitext2' already",
    ),
    # YAML
    ("a tab", edited("  data: w", "\tdata: w"), 4, "Indent with spaces, not tabs"),
    ("a bracket open", edited("identity", "{pca: {of: raw}"), 24, "not YAML: expected ',' or '}'"),
    ("a quote open", edited("seed: 1", "seed: 'x"), 30, "not YAML: found unexpected end of stream"),
    (
        "a colon too many",
        edited("seed: 1", "seed: 1: 2"),
        10,
        "not YAML: mapping values are not allowed here",
    ),
    ("indentation", edited("  tokens", "   tokens"), 6, "not YAML"),
    (
        "an unknown alias",
        edited("some/model", "*model"),
        2,
        "not YAML: found undefined alias 'model'",
    ),
    (
        "a python tag",
        edited("some/model", "!!python/object/apply:os.system [ls]"),
        2,
        "the tag tag:yaml",
    ),
    ("a tag of one's own", edited("some/model", "!include x"), 2, "the tag !include"),
    ("a tagged mapping", edited("pca: {", "pca: !!omap {"), 16, "Recipes are plain data"),
    (
        "a tag that does not fit",
        edited("seed: 1", "seed: !!int x"),
        10,
        "'x' is no value of its type",
    ),
    (
        "a truth value that is none",
        edited("seed: 1", "seed: !!bool x"),
        10,
        "'x' is no value of its type",
    ),
    (
        "a number of 5000 digits",
        edited("seed: 1", "seed: " + "9" * 5000),
        10,
        "is no value of its type",
    ),
    ("an escape beyond Unicode", edited("some/model", '"\\UFFFFFFFF"'), 2, "not YAML"),
    ("a version of the future", "%YAML 3.0\n---\n" + GOOD, 1, "not YAML: found incompatible"),
    ("a minor version of the future", "%YAML 1.7\n---\n" + GOOD, 1, "not YAML"),
    ("a NUL", edited("seed: 1", "seed: \x00"), 10, "Recipes are plain text"),
    ("two documents", GOOD + "---\n" + GOOD, 30, "Put one recipe in a file"),
    ("an empty text", "", 1, "empty. Write at least `model` and `steps`"),
    ("comments alone", "# a\n# b\n", 1, "empty"),
    ("null", "~\n", 1, "empty"),
    ("a list", "# a\n- model: m\n", 2, "got a list, but a recipe is a mapping"),
    ("a word", "\n\nrecipe\n", 3, "got 'recipe', but a recipe is a mapping"),
    ("an endless alias", edited("some/model", "&a [*a]"), 2, "aliases expand to too many values"),
    ("a nesting bomb", edited("some/model", "[" * 50_000), 2, "too deeply nested"),
    (
        "a nesting bomb of blocks",
        edited("some/model", "\n  " + "- " * 5000 + "x"),
        3,
        "too deeply nested",
    ),
    ("a nesting bomb of mappings", edited("some/model", "{a: " * 5000), 2, "too deeply nested"),
    (
        "too many values",
        edited("some/model", "[" + "1," * 40_000 + "]"),
        2,
        "too long for a recipe",
    ),
    (
        "an alias bomb",
        "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)),
        1,
        "aliases expand to too many values",
    ),
]


@pytest.mark.parametrize(
    ("text", "line", "told"), [m[1:] for m in MALFORMED], ids=[m[0] for m in MALFORMED]
)
def test_a_malformed_recipe_is_refused_at_its_line(text: str, line: int, told: str) -> None:
    message = refused(text)
    assert message.startswith(f"r.yaml:{line}: ")
    assert told in message
    assert "\n" not in message and len(message) < 400


def test_the_first_mistake_is_told_and_a_missing_key_after_a_misspelt_one() -> None:
    assert refused(edited("64", "0").replace("seed: 1", "seed: x")).startswith("r.yaml:5:")
    assert refused("modle: m\nsteps: [{spaces: mlp}]\nseed: x").startswith(
        "r.yaml:1: modle: unknown key"
    )


def test_aliases_stand_for_what_they_name_and_dates_stay_words() -> None:
    r = parse_recipe(
        "model: 2024-01-01\nseed: 1_0\nsteps: [{spaces: mlp, rotate: &r identity}, {spaces: vo, rotate: *r}]\n"
        "evaluate: [{perplexity: {data: yes}}]"
    )
    assert (r.model, r.seed, r.evaluate[0].perplexity.data) == ("2024-01-01", 10, "yes")
    assert r.steps[0].rotate == r.steps[1].rotate


def test_an_anchor_may_be_set_twice_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_recipe("model: &a m\nseed: &a 3\nsteps: [{spaces: mlp}]").seed == 3


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_text_ends_in_a_traceback(data: st.DataObject) -> None:
    text = GOOD
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(text)))
        j = data.draw(st.integers(0, 8))
        text = (
            text[:i]
            + data.draw(st.text("{}[]:,-&*!|>'\"%@#?~<= \n\t\\0e.naU\x00é", max_size=4))
            + text[i + j :]
        )
    try:
        parse_recipe(text, "r.yaml")
    except InputError as e:
        assert re.match(r"r\.yaml:\d+: .", str(e))
