"""Layouts: names, groups and costs against hand-computed ones; and what is not known is refused."""

from __future__ import annotations

import pytest
import torch
from declared import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCABULARY, cut, elements, rotations, tiny, tiny_models, weights
from transformers import AutoConfig, AutoModelForCausalLM

from invariance.core.errors import InputError
from invariance.core.group import Group
from invariance.core.kind import space_name
from invariance.model.axes import Axis, Edge, Role
from invariance.model.canonical import canonicalize, layout_of
from invariance.model.families import architecture
from invariance.model.labels import label
from invariance.model.layout import Parameters
from invariance.model.modules import Block
from invariance.model.reparametrize import reparametrize

V, d, m = VOCABULARY, 16, 24  # and 2 layers, 4 heads, 2 of them for keys and values, each 4 wide


def llama(**options):
    model = tiny("llama", **options)
    return model, canonicalize(model, fold=False)


# Spaces and names


def test_spaces_are_selected_by_kind_by_name_and_by_glob():
    _, layout = llama()
    assert (
        list(layout.select(["residual"]))
        == ["x.0.0", "x.0.1", "x.1.0", "x.1.1", "x.2.0"]
        == layout.points
    )
    assert layout.select(["mlp"]) == ["mlp.0", "mlp.1"]
    assert layout.select(["mlp.1"]) == ["mlp.1"]
    assert layout.select(["x.*.1"]) == ["x.0.1", "x.1.1"]
    assert layout.select(["vo.[1-9]", "qk", "qk.0"]) == ["qk.0", "qk.1", "vo.1"]
    assert layout.select(["*"]) == list(layout.spaces)
    assert layout.select(["heads"]) == ["heads.0", "heads.1"]
    assert layout.select(["head", "mlp.7", "MLP"]) == []


def test_edges_run_from_each_point_to_the_next():
    _, layout = llama()
    assert layout.edges[1] == Edge("model.layers.0.stages.1", "x.0.1", "x.1.0", 0, 1, True)
    assert [e.target for e in layout.edges] == layout.points[1:] and layout.depth == 4
    parallel = label_of("phi")
    assert parallel.points == ["x.0.0", "x.1.0", "x.2.0"] and parallel.depth == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_spaces_say_by_fields_where_they_lie_and_their_names_follow(family):
    matrices = list(label_of(family).matrices)
    layout = layout_of(tiny(family).config, split=[matrices[0], matrices[-1]])
    for name, s in layout.spaces.items():
        assert name == s.name == space_name(s.kind, s.block, s.stage, s.part)
    inner = [layout.inside(edge) for edge in layout.edges]
    assert [n for names in inner for n in names] == [
        n for n in layout.spaces if n not in layout.points
    ]
    for edge, names in zip(layout.edges, inner, strict=True):  # each lies where its weights do
        for n in names:
            here = [
                weight
                for weight, axes in layout.axes.items()
                for axis in axes
                if axis is not None and any(a.space == n for a in axis.spaces)
            ]
            assert here and all(w.startswith(f"{edge.stage}.") for w in here)
        source, target = layout.spaces[edge.source], layout.spaces[edge.target]
        assert (source.block, source.stage) == (edge.block, edge.number)
        assert edge.leaves == (target.block == edge.block + 1)
        assert edge.entry == f"x.{edge.block}.0"


def label_of(family, **options):
    return layout_of(tiny(family, **options).config)


@pytest.mark.parametrize(
    ("family", "options", "mlp", "qk", "copies", "rotary"),
    [
        ("llama", {}, Group.MONOMIAL, Group.ROTARY, 2, 4),
        ("llama", {"hidden_act": "relu", "head_dim": 6}, Group.MONOMIAL, Group.ROTARY, 2, 6),
        ("opt", {}, Group.POSITIVE_MONOMIAL, Group.INVERTIBLE, 4, 0),
        ("opt", {"activation_function": "gelu"}, Group.PERMUTATION, Group.INVERTIBLE, 4, 0),
        ("phi", {}, Group.PERMUTATION, Group.ROTARY, 2, 2),
        ("phi", {"hidden_act": "relu"}, Group.POSITIVE_MONOMIAL, Group.ROTARY, 2, 2),
    ],
)
def test_groups_follow_from_activation_and_positions(family, options, mlp, qk, copies, rotary):
    spaces = label_of(family, **options).spaces
    assert spaces["mlp.0"].group is mlp and spaces["mlp.0"].copies == 1
    assert (spaces["qk.1"].group, spaces["qk.1"].copies, spaces["qk.1"].rotary) == (
        qk,
        copies,
        rotary,
    )
    assert spaces["vo.1"].group is Group.INVERTIBLE and spaces["vo.1"].copies == copies
    assert spaces["x.2.0"].group is Group.IDENTITY  # its norms have gains still
    folded = layout_of(tiny(family, **options).config, fold=True)
    assert folded.spaces["x.2.0"].group is Group.ORTHOGONAL
    heads = spaces["heads.1"]
    assert (heads.group, heads.dim, heads.copies) == (Group.PERMUTATION, copies, 1)
    assert (
        heads.grain == 4 // copies * spaces["vo.1"].dim
    )  # of four query heads, those of one group
    assert spaces["vo.0"].dim == spaces["qk.0"].dim == options.get("head_dim", 4)


def test_weights_meet_their_spaces_on_the_right_axes():
    _, layout = llama(attention_bias=True)
    stage = "model.layers.1.stages"
    read = Axis("x.1.0", Role.READ)
    made, mixed = Axis("heads.1", Role.WRITE), Axis("heads.1", Role.READ)
    assert layout.axes[f"{stage}.0.attention.q.weight"] == (Axis("qk.1", Role.READ, 4, made), read)
    assert layout.axes[f"{stage}.0.attention.k.bias"] == (Axis("qk.1", Role.WRITE, 2, made),)
    assert layout.axes[f"{stage}.0.attention.out.weight"] == (
        Axis("x.1.1", Role.WRITE),
        Axis("vo.1", Role.READ, 4, mixed),
    )
    assert layout.axes[f"{stage}.1.mlp.gate.weight"] == (
        Axis("mlp.1", Role.GATE),
        Axis("x.1.1", Role.READ),
    )
    assert layout.axes["lm_head.weight"] == (None, Axis("x.2.0", Role.READ))
    assert layout.axes["model.embed_tokens.weight"] == (None, Axis("x.0.0", Role.WRITE))
    assert (
        layout.readers("heads.1")
        == layout.readers("vo.1")
        == [(f"{stage}.0.attention.out.weight", 1)]
    )
    assert layout.readers("mlp.1") == [(f"{stage}.1.mlp.down.weight", 1)]
    assert layout.readers("x.1.1") == [
        (f"{stage}.1.mlp.gate.weight", 1),
        (f"{stage}.1.mlp.up.weight", 1),
    ]


@given(model=tiny_models(), fold=st.booleans(), keep=st.booleans())
def test_the_layout_of_a_config_is_the_layout_of_its_model(model, fold, keep):
    tie = "keep" if keep and hasattr(model.config, "rms_norm_eps") else "untie"
    planned = layout_of(model.config, fold=fold, tie=tie)
    assert planned == canonicalize(model, fold=fold, tie=tie)


def test_a_sliced_model_is_labelled_by_its_own_widths():
    model = tiny("llama")
    layout = canonicalize(model, fold=True)
    kept = {"x.0.1": 9, "mlp.0": 7, "vo.1": 3}
    changes = {n: cut(c, kept[n]) for n, c in rotations(elements(layout, kept, 0)).items()}
    reparametrize(model, layout, changes)
    again = label(model)
    assert {n: s.dim for n, s in again.spaces.items()} == {
        n: s.dim for n, s in layout.spaces.items()
    } | kept
    assert again.shortcuts == {"model.layers.0.stages.0", "model.layers.0.stages.1"}


# Costs


ATTENTION, MLP = d * d + 2 * 8 * d + d * d, 3 * d * m


def test_parameters_of_a_llama_by_hand():
    _, layout = llama()
    assert layout.parameters({}) == Parameters(V * d, 2 * (ATTENTION + MLP + 2 * d), 0, V * d + d)
    assert layout.parameters({}).total == layout.parameters({}).to_dict()["total"] == 4912
    _, layout = llama(tie_word_embeddings=True)
    assert layout.parameters({}) == Parameters(V * d, 2 * (ATTENTION + MLP + 2 * d), 0, d)
    _, layout = llama(attention_bias=True, mlp_bias=True)
    biases = (d + 8 + 8 + d) + (m + m + d)
    assert layout.parameters({}).blocks == 2 * (ATTENTION + MLP + 2 * d + biases)
    config = tiny("llama", tie_word_embeddings=True).config
    kept, untied = (
        layout_of(config, fold=True, tie="keep"),
        layout_of(config, fold=True, tie="untie"),
    )
    assert kept.tied and kept.parameters({}) == Parameters(V * d, 2 * (ATTENTION + MLP), 0, d * d)
    assert not untied.tied and untied.parameters({}) == Parameters(
        V * d, 2 * (ATTENTION + MLP), 0, V * d
    )


def test_parameters_at_other_widths_by_hand():
    layout = layout_of(tiny("llama").config, fold=True)
    kept = {"x.0.1": 10, "mlp.1": 6, "vo.0": 3, "qk.0": 2}
    q, k, v, out = 8 * d, 4 * d, 6 * d, 12 * 10
    blocks = (q + k + v + out) + 3 * m * 10 - m * 10 + m * d + ATTENTION + 3 * 6 * d
    own = {p: p for p in layout.points}  # a basis of its own for each point
    shortcuts = 2 * (10 * d) + 2 * (d * d)
    assert layout.parameters(kept, own) == Parameters(V * d, blocks, shortcuts, V * d)
    assert layout.parameters(kept, {"x.0.1": 1}).shortcuts == 2 * (10 * d)
    assert (
        layout.parameters(
            dict.fromkeys(layout.points, 10), dict.fromkeys(layout.points, 1)
        ).shortcuts
        == 0
    )
    assert layout.flops(kept, own) == 2 * (blocks + shortcuts + V * d)
    assert layout.kv_entries(kept) == 2 * (2 + 3) + 2 * (4 + 4)


def test_heads_and_branches_that_go_cost_nothing_by_hand():
    _, layout = llama(attention_bias=True, mlp_bias=True)
    biases = (d + 8 + 8 + d) + (m + m + d)
    one_group = {
        "heads.0": 1,
        "vo.0": 3,
    }  # two of four query heads stay, with one of two key and value heads
    first = (8 * d + 4 * d + 3 * d + 6 * d) + (8 + 4 + 3 + d)
    saved = ATTENTION + (d + 8 + 8 + d) - first
    whole = 2 * (ATTENTION + MLP + 2 * d + biases)
    assert layout.parameters(one_group).blocks == whole - saved
    assert layout.kv_entries(one_group) == 1 * (4 + 3) + 2 * (4 + 4)
    assert layout.stages(one_group) == [e.stage for e in layout.edges] and layout.blocks(
        one_group
    ) == [0, 1]
    no_mlp = {"mlp.1": 0}  # its norm goes with it
    assert layout.parameters(no_mlp).blocks == whole - MLP - (m + m + d) - d
    assert layout.flops(no_mlp) == layout.flops({}) - 2 * MLP
    assert layout.stages(no_mlp) == [e.stage for e in layout.edges[:3]] and layout.blocks(
        no_mlp
    ) == [0, 1]
    no_block = {"mlp.1": 0, "heads.1": 0}
    assert layout.parameters(no_block).blocks == whole / 2 and layout.blocks(no_block) == [0]
    assert layout.kv_entries(no_block) == layout.kv_entries({}) / 2
    parallel = label_of("phi")
    assert parallel.stages({"mlp.0": 0}) == parallel.stages({})  # the other branch needs the norm
    norm = (
        parallel.parameters({"heads.0": 0}).blocks
        - parallel.parameters({"heads.0": 0, "mlp.0": 0}).blocks
    )
    assert norm == 2 * d * m + m + d + 2 * d  # the branch, its biases, and a LayerNorm


def test_flops_and_cache_of_a_llama_by_hand():
    _, layout = llama()
    assert layout.flops({}) == 2 * (2 * (ATTENTION + MLP) + V * d)
    assert layout.kv_entries({}) == 2 * 2 * (4 + 4)
    _, tied = llama(tie_word_embeddings=True)
    assert tied.flops({}) == layout.flops({})  # a head costs the same, stored once or twice
    config = tiny("llama", tie_word_embeddings=True).config
    assert layout_of(config, fold=True, tie="keep").flops({}) == layout.flops({}) + 2 * d * d


# Refusals


def test_a_model_that_the_grammar_does_not_speak_of_is_refused_untouched():
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=V)
    model = AutoModelForCausalLM.from_config(config)
    before = weights(model)
    for attempt in (
        lambda: canonicalize(model, fold=True),
        lambda: layout_of(config),
        lambda: architecture(config),
    ):
        with pytest.raises(InputError, match=r"'gpt2'.*reads the norm 'ln_1'"):
            attempt()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("phi", {"qk_layernorm": True}, "by a LayerNorm"),
        ("opt", {"do_layer_norm_before": False}, "no norm stands between its last layer"),
        ("opt", {"word_embed_proj_dim": 8}, "does not begin with the sum of the rows"),
        ("opt", {"_remove_final_layer_norm": True}, "no norm stands between its last layer"),
    ],
)
@pytest.mark.parametrize("fold", [False, True])
def test_a_variant_that_the_declaration_does_not_cover_is_refused_untouched(
    family, options, named, fold
):
    assert canonicalize(tiny(family), fold=fold)  # the plain variant is not
    model = tiny(family, **options)
    before = weights(model)
    with pytest.raises(InputError, match=named) as refusal:
        canonicalize(model, fold=fold)
    assert f"'{family}'" in str(refusal.value)
    assert not any(isinstance(module, Block) for module in model.modules())
    after = weights(model)
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in after)
    with pytest.raises(InputError, match=named):
        layout_of(model.config, fold=fold)


def test_a_weight_that_nobody_declared_is_refused():
    model = tiny("llama")
    extra = torch.nn.Linear(16, 16)
    model.model.layers[1].mlp.adapter = extra
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.adapter\.weight"):
        canonicalize(model, fold=False)
