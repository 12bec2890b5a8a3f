"""The text of a layout: exact both ways, strict, and checked against the model."""

from __future__ import annotations

import pytest
from described import KINDS, described
from transformers import AutoConfig

from invariance.core.errors import InputError
from invariance.model.described import text
from invariance.model.described.cache import kept
from invariance.model.described.check import check


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_reads_as_what_was_written_and_fits_its_model(kind):
    model, description = described(kind)
    told = text.write(description)
    assert text.read(told) == description
    assert text.write(text.read(told)) == told
    check(description, model)


@pytest.mark.parametrize(
    "kind", ["llama", "gpt_neox", "gpt2", "gemma2", "mixtral", "bloom", "olmo2"]
)
def test_two_layers_of_a_type_print_the_same_text(kind):
    _, description = described(kind)
    assert [part.layers for part in description.layers] == [(0, 1)]


def test_llama_reads_as_the_design_says():
    told = text.write(described("llama")[1])
    for line in (
        "space residual     O            32",
        "space vo@          GL           16 in 2 of 8: i<2{[8i:+8]}",
        "space ch@          PERM·R±      40",
        "axis  self_attn.v_proj.weight             1  residual  × input_layernorm.weight  reads 0",
        "axis  self_attn.o_proj.weight             0  residual  writes 1",
        "axis  mlp.up_proj.weight                  0  ch@^-1",
        "axis  mlp.gate_proj.weight                1  residual  × post_attention_layernorm.weight  reads 1",
        "axis  lm_head.weight                      1  residual  × model.norm.weight  reads -1",
    ):
        assert line in told.split("\n")


def test_parallel_blocks_read_one_point_and_sequential_blocks_two():
    def reads(kind: str) -> set[int]:
        axes = described(kind)[1].layers[0].axes
        return {p.number for a in axes for p in a.points if not p.writes}

    assert reads("gpt_neox") == {0}  # attention and MLP stand side by side
    assert reads("llama") == {0, 1}


@pytest.mark.parametrize(
    ("was", "now", "why"),
    [
        ("layout 1", "layout 7", ":1: a layout begins"),
        ("PERM·R±      40", "PERM·R±      many", "a space is written"),
        (
            "axis  lm_head.weight                      0  -",
            "axes lm_head.weight",
            "begins with one of",
        ),
        (
            "mlp.up_proj.weight                  0  ch@^-1",
            "mlp.up_proj.weight  0  ch@^-1",
            "stands for",
        ),
        ("ch@^-1", "chan@^-1", "no space 'chan@'"),
    ],
)
def test_a_line_that_was_not_written_so_is_refused_with_its_number(was, now, why):
    told = text.write(described("llama")[1])
    with pytest.raises(InputError, match=why):
        text.read(told.replace(was, now), "some.layout")


@pytest.mark.parametrize(
    ("was", "now", "why"),
    [
        ("mlp.up_proj.weight  ", "mlp.big_proj.weight ", "has no parameter"),
        ("i<2{[8i:+8]}", "i<2{[7i:+8]}", "blocks of vo@"),
        ("j<2{i<2{vo@[8j:+8]}}", "j<2{i<2{vo@[8i:+8]}} vo@", "32 there"),
        ("qk@^-1[8j:+8]", "qk@^-1[8j+1:+8]", "no coordinate"),
        ("j<2{i<2{vo@[8j:+8]}}", "j<2{i<2{vo@[0:+8]}}", "as often as the others"),
        ("× input_layernorm.weight", "× self_attn.o_proj.weight", "no gain"),
    ],
)
def test_a_text_of_another_model_names_parameter_and_axis(was, now, why):
    model, description = described("llama")
    told = text.write(description)
    assert was in told
    with pytest.raises(InputError, match=why):
        check(text.read(told.replace(was, now), "some.layout"), model, "some.layout")


def test_a_layout_is_derived_once_and_a_spoiled_file_counts_as_missing(tmp_path):
    model, description = described("llama")
    made = []

    def make():
        made.append(1)
        return description

    def ask(config=model.config, rules="rules 1"):
        return kept(tmp_path, config, model, make, rules)

    assert ask() == ask() == description and len(made) == 1
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace("ch@^-1", "ch@^-2"))
    assert ask() == description and len(made) == 2
    path.write_bytes(b"\xff" + path.read_bytes())
    assert ask() == description and len(made) == 3
    ask(rules="rules 2")
    ask(config=AutoConfig.for_model("llama", hidden_size=32))
    assert len(made) == 5
