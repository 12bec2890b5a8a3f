"""Recipes from files and with overrides: each refusal names the file's line, or the `--set` at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from texts import GOOD, edited, refused

from invariance.core.errors import InputError
from invariance.method.interfaces import find
from invariance.recipe.recipe import Recipe, load_recipe, parse_recipe
from invariance.recipe.step import Every, Step


@pytest.mark.parametrize(
    ("raw", "line", "told"),
    [
        (GOOD.encode("utf-16"), 1, "not UTF-8 text"),
        (edited("seed: 1", "seed: é").encode("latin-1"), 10, "not UTF-8 text"),
        (b"\x7fELF\x02\x01\x00\x00", 1, "Recipes are plain text"),
        (b"\x80\x04\x95 pickle", 1, "not UTF-8 text"),
        (b"", 1, "empty"),
    ],
)
def test_a_file_that_is_no_text_is_refused(
    tmp_path: Path, raw: bytes, line: int, told: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}:{line}: ") and told in str(caught.value)


def test_a_file_beyond_one_mebibyte_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(GOOD.encode() + b"#" * 2**21)
    with pytest.raises(InputError, match="larger than 1 MiB"):
        load_recipe(path)
    path.write_bytes(b"#" * (2**20 + 1) + b"\xff")  # the size is told, not the encoding
    with pytest.raises(InputError, match="larger than 1 MiB"):
        load_recipe(path)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "slicegpt.yaml").write_text(GOOD)
    with pytest.raises(
        InputError, match=r"slicegtp\.yaml: no such file; did you mean 'slicegpt\.yaml'\?"
    ):
        load_recipe(tmp_path / "slicegtp.yaml")
    with pytest.raises(InputError, match="Is a directory"):
        load_recipe(tmp_path)
    with pytest.raises(InputError, match="Not a directory"):
        load_recipe(tmp_path / "slicegpt.yaml" / "x")
    with pytest.raises(InputError, match="null byte"):
        load_recipe("a\x00b")


def test_a_file_with_a_byte_order_mark_and_its_overrides_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_recipe(path) == parse_recipe(GOOD)
    assert load_recipe(str(path), ["seed=7"]).seed == 7


# --- overrides

UNIFORM = find("select", "uniform")
BASE = parse_recipe(GOOD)


def at(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for part in path.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("assignments", "path", "value"),
    [
        (["seed=7"], "seed", 7),
        (["seed=7", "seed=8"], "seed", 8),
        (["model=a=b"], "model", "a=b"),
        (["model=packaged:x"], "model", "packaged:x"),
        (["model='3'"], "model", "3"),
        (["calibrate.dtype=float32"], "calibrate.dtype", "float32"),
        (["calibrate.sequences=null"], "calibrate.sequences", None),
        (["budget=null", "steps.1.select.uniform.width=12"], "budget", None),
        (["budget=null", "budget.parameters=0.5"], "budget.parameters", 0.5),
        (["evaluate=null"], "evaluate", ()),
        (
            ["evaluate=null", "evaluate.0.perplexity.data=t.npy"],
            "evaluate.0.perplexity.data",
            "t.npy",
        ),
        (["evaluate.0.perplexity.data=tokens.npy"], "evaluate.0.perplexity.data", "tokens.npy"),
        (["evaluate.1.perplexity.data=more"], "evaluate.1.perplexity.data", "more"),
        (["steps.1=null", "budget=null"], "steps", BASE.steps[:1]),
        (["steps.2=null"], "steps", BASE.steps),
        (["steps.2={spaces: qk}"], "steps.2", Step(spaces=("qk",))),
        (["steps.0.spaces=x.3.1"], "steps.0.spaces", ("x.3.1",)),
        (["steps.1.spaces=[mlp]"], "steps.1.spaces", ("mlp",)),
        (["steps.1.spaces.1=qk"], "steps.1.spaces", ("mlp", "qk")),
        (["steps.0.segments=null"], "steps.0.segments", "global"),
        (["steps.0.segments=null", "steps.0.segments.every=3"], "steps.0.segments", Every(every=3)),
        (["steps.0.rotate=hadamard"], "steps.0.rotate.name", "hadamard"),
        (["steps.1.rotate=pca", "steps.1.rotate.pca.of=normed"], "steps.1.rotate.of", "normed"),
        (["steps.0.rotate=null"], "steps.0.rotate.name", "identity"),
        (["steps.0.slice.truncate={}"], "steps.0.slice.name", "truncate"),
        (["steps.0.select.uniform.width=432"], "steps.0.select", UNIFORM(width=432, multiple_of=8)),
        (["steps.1.select.uniform.multiple_of=1"], "steps.1.select", UNIFORM()),
        (
            ["steps.0.select.uniform.width=4", "steps.0.select.uniform.keep=0.5"],
            "steps.0.select.keep",
            0.5,
        ),
        (
            ["steps.0.select.uniform.multiple_of=4"],
            "steps.0.select",
            UNIFORM(keep=0.75, multiple_of=4),
        ),
        (["steps.0.select.uniform.keep=null"], "steps.0.select", UNIFORM(multiple_of=8)),
        (["calibrate.nothing.here=null"], "calibrate.sequences", 64),
    ],
)
def test_an_override_reaches_its_key_and_leaves_the_others(
    assignments: list[str], path: str, value: Any
) -> None:
    recipe = parse_recipe(GOOD, overrides=assignments)
    assert at(recipe, path) == value
    untouched = {"model", "calibrate", "order", "refit", "budget", "seed", "steps", "evaluate"} - {
        path.split(".")[0]
    }
    if len(assignments) == 1:
        assert all(getattr(recipe, key) == getattr(BASE, key) for key in untouched)


def test_an_override_of_one_use_of_an_alias_leaves_the_other() -> None:
    text = "model: m\nsteps: [{spaces: mlp, select: &s {uniform: {keep: 0.5}}}, {spaces: vo, select: *s}]"
    r = parse_recipe(text, overrides=["steps.0.select.uniform.keep=0.25"])
    assert [at(r, f"steps.{i}.select.keep") for i in (0, 1)] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("seed", "--set seed: not KEY=VALUE"),
        ("=1", "--set =1: not KEY=VALUE"),
        ("steps..0=1", "not KEY=VALUE"),
        ("a" + ".a" * 5000 + "=1", "not KEY=VALUE"),
        ("seed=", "--set seed: no value. Write null to remove the key"),
        ("seed=# nothing", "--set seed: no value"),
        ("sead=1", "--set sead: unknown key 'sead'; did you mean 'seed'?"),
        ("seed=-1", "--set seed: got -1, but it should be greater than or equal to 0"),
        ("seed=.nan", "--set seed: nan is not a finite number"),
        ("model=!!python/name:os.system x", "--set model: the tag"),
        ("model='x", "--set model: not YAML"),
        ("model=*x", "--set model: not YAML"),
        ("model=[" + "[" * 1000, "--set model: too deeply nested"),
        ("model=null", "--set model: the key 'model' is missing"),
        ("model.name=x", "--set model.name: 'some/model' stands above 'name', and has no keys"),
        ("calibrate.data=null", "--set calibrate.data: calibrate: the key 'data' is missing"),
        (
            "budget.parameters=2",
            "--set budget.parameters: got 2, but it should be less than or equal to 1",
        ),
        (
            "steps.3={spaces: qk}",
            "--set steps.3: '3' is no index of 2 items. Count from 0; 2 adds one.",
        ),
        ("steps.-1.spaces=qk", "--set steps.-1.spaces: '-1' is no index"),
        ("steps.first.spaces=qk", "--set steps.first.spaces: 'first' is no index"),
        ("steps." + "9" * 5000 + "=1", "is no index"),
        ("steps.2.rotate=pca", "--set steps.2.rotate: steps.2: the key 'spaces' is missing"),
        (
            "steps.0.rotate.pca.of=norm",
            "--set steps.0.rotate.pca.of: got 'norm', but it should be 'raw'",
        ),
        (
            "steps.0.rotate.pca.off=1",
            "--set steps.0.rotate.pca.off: 'pca' has no option 'off'; did you mean 'of'?",
        ),
        ("steps.0.rotate.pcs.of=raw", "did you mean 'pca'?"),
        (
            "steps.1.rotate.pca.of=raw",
            "'identity' stands above 'pca', and has no keys. Set the key above as a whole",
        ),
        (
            "steps.0.select.uniform.width=-1",
            "--set steps.0.select.uniform.width: width must be at least 0",
        ),
        ("steps.0.select.uniform.width=4.5", "--set steps.0.select.uniform.width: got 4.5"),
        ("steps.0.select.global_energy.of=share", "'uniform' stands here already; keep one method"),
        (
            "steps.0.select={uniform: {keep: 0.5, width: 3}}",
            "'keep' and 'width' exclude each other",
        ),
    ],
)
def test_an_override_that_cannot_be_is_refused_by_its_own_name(assignment: str, told: str) -> None:
    message = refused(GOOD, assignment)
    assert message.startswith("--set ") and told in message


def test_a_mistake_in_the_file_keeps_its_line_beside_overrides() -> None:
    assert refused(edited("64", "0"), "seed=3", "steps.1=null").startswith("r.yaml:5: ")
