"""The theorem: group elements leave the function alone, slices are projectors. With controls that fail."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from projected import project
from tiny import (
    canonical_copy,
    cut,
    elements,
    fewer,
    rotations,
    seeds,
    segments,
    share,
    stored,
    subset,
    tiny,
    tiny_models,
    tokens,
    weights,
    widths,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from invariance.core.change import Change
from invariance.core.dense import as_operator, in_group
from invariance.core.errors import InvarianceError
from invariance.core.group import Group
from invariance.core.kind import KINDS
from invariance.core.operator import Operator
from invariance.model import verify
from invariance.model.canonical import canonicalize
from invariance.model.families import architecture
from invariance.model.labels import label
from invariance.model.layout import Layout
from invariance.model.reparametrize import reparametrize
from invariance.model.verify import CHANGED, logits, relative_error, tolerance

MOVED = 1e-3  # what a control must move the logits by at least: nine orders above the tolerance
bys = st.sampled_from(["stage", "block", "global"])


def forms(model: PreTrainedModel) -> st.SearchStrategy[dict[str, Any]]:
    """The canonical forms a model admits, as options: folded or not, its tie kept where it can be."""
    ties = ["untie", "keep"] if hasattr(model.config, "rms_norm_eps") else ["untie"]
    return st.builds(dict, fold=st.booleans(), tie=st.sampled_from(ties))


def draw_bases(data: st.DataObject, layout: Layout, least: int = 0) -> dict[str, Tensor]:
    """Any elements of any spaces that the form lets change; points of the stream share one by segments."""
    names = [n for n, s in layout.spaces.items() if layout.folded or s.kind != "residual"]
    bases = elements(layout, subset(data, names, least), data.draw(seeds, label="seed"))
    return share(bases, segments(layout, data.draw(bys, label="segments")))


def draw_slices(data: st.DataObject, layout: Layout) -> tuple[dict[str, Change], dict[str, Any]]:
    """Slices of any spaces along any elements, each its own width; and which points share a basis."""
    names = subset(data, list(layout.spaces), 1)
    heads = segments(layout, data.draw(bys, label="segments"))
    changes = rotations(elements(layout, names, data.draw(seeds, label="seed")))
    kept = widths(layout, names, data)
    sliced = share(
        {n: cut(c, kept.get(n, c.width), layout.spaces[n]) for n, c in changes.items()}, heads
    )
    return sliced, {n: id(c) for n, c in sliced.items()}


# The family's own function, and ours


@given(model=tiny_models(), attention=st.sampled_from(["sdpa", "eager"]), seed=seeds)
def test_restructuring_alone_is_the_familys_function_on_padded_batches(model, attention, seed):
    model.config._attn_implementation = attention
    ids = tokens(seed, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :2], mask[2, -3:] = 0, 0
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        depth = canonicalize(model, fold=False).depth
        after = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        unmasked = model(input_ids=ids).logits[mask.bool()]
    assert relative_error(before, after) <= tolerance(torch.float32, depth)
    assert relative_error(before, unmasked) > MOVED  # so the mask is heeded


@given(model=tiny_models(), seed=seeds)
def test_in_float64_the_restructured_model_is_the_family_with_torchs_own_norms(model, seed):
    family = copy.deepcopy(model).double()
    rms = architecture(model.config).rms
    for name, module in family.named_modules():
        if "RMSNorm" in type(module).__name__:  # these compute in float32 whatever they are given
            norm = nn.RMSNorm(len(module.weight), eps=getattr(module, rms.eps), dtype=torch.float64)
            norm.weight = nn.Parameter(rms.offset + module.weight.detach())
            family.set_submodule(name, norm)
    twin = verify.exact_copy(model)
    reference, bound = logits(family, tokens(seed)), tolerance(torch.float64, label(twin).depth)
    assert relative_error(reference, logits(twin, tokens(seed))) <= bound
    twin.get_submodule(label(twin).edges[0].stage).norm.eps += 1e-6
    assert relative_error(reference, logits(twin, tokens(seed))) > 100 * bound


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 3}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
        ("gemma3_text", {"sliding_window": 3}),
        ("phi", {}),
    ],
)
def test_attention_functions_are_called_as_by_the_family(family, options, monkeypatch):
    def record(module, *args, **kwargs):
        about = (module.layer_idx, module.is_causal, module.num_key_value_groups)
        calls.append((*about, *(kwargs.get(k) for k in ("scaling", "sliding_window", "dropout"))))
        return sdpa(module, *args, **kwargs)

    calls = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", record)
    model = tiny(family, **options)
    logits(model, tokens())
    canonicalize(model, fold=False)
    logits(model, tokens())
    assert len(calls) == 4 and calls[:2] == calls[2:]
    assert any(c[4] for c in calls) == bool(options)


# Rotation


@given(model=tiny_models(), data=st.data())
def test_any_group_elements_of_any_spaces_leave_logits_unchanged(model, data):
    ids = tokens(data.draw(seeds, label="tokens"))
    before = logits(verify.exact_copy(model), ids)
    changed, layout = canonical_copy(model, **data.draw(forms(model), label="form"))
    reparametrize(changed, layout, rotations(draw_bases(data, layout)))
    assert relative_error(before, logits(changed, ids)) <= tolerance(torch.float64, layout.depth)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 3}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True}),
        ("gemma3_text", {"attention_bias": True}),
        ("opt", {}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("opt", {"layer_norm_elementwise_affine": False, "enable_bias": False}),
        ("phi", {}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_space_at_once_in_each_variant(family, options, tied):
    model = tiny(family, tie_word_embeddings=tied, **options)
    for tie in ["untie", "keep"] if hasattr(model.config, "rms_norm_eps") else ["untie"]:
        _, layout = canonical_copy(model, fold=True, tie=tie)
        assert verify.certify(
            model, verify.random_bases(layout), tokens(), fold=True, tie=tie
        ).passed


@fewer
@given(model=tiny_models(), data=st.data())
def test_a_float32_model_keeps_its_logits_to_float32_rounding(model, data):
    ids = tokens(data.draw(seeds, label="tokens"))
    before = logits(verify.exact_copy(model), ids)
    layout = canonicalize(model, **data.draw(forms(model), label="form"))
    bases = draw_bases(data, layout, least=1)
    half = copy.deepcopy(model)
    reparametrize(model, layout, rotations(bases))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert relative_error(before, logits(model, ids)) <= tolerance(torch.float32, layout.depth)
    reparametrize(half, layout, verify.half(layout, bases, seed=1))
    assert relative_error(before, logits(half, ids)) > MOVED


@pytest.mark.parametrize("kind", KINDS)
@fewer
@given(model=tiny_models(), seed=seeds)
def test_half_a_change_moves_the_logits(kind, model, seed):
    before = logits(verify.exact_copy(model), tokens(seed))
    changed, layout = canonical_copy(model, fold=True, tie="untie")
    reparametrize(changed, layout, verify.half(layout, dict.fromkeys(layout.select([kind])), seed))
    assert relative_error(before, logits(changed, tokens(seed))) >= MOVED


# Composition


@fewer
@given(model=tiny_models(), data=st.data())
def test_one_space_at_a_time_equals_all_at_once(model, data):
    together, layout = canonical_copy(model, **data.draw(forms(model), label="form"))
    apart = copy.deepcopy(together)
    changes = rotations(draw_bases(data, layout, least=2))
    reparametrize(together, layout, changes)
    drawn = data.draw(st.permutations(list(changes)), label="order")
    *others, last = sorted(
        drawn, key=lambda n: n.startswith("heads.")
    )  # the copies of the others move with them
    for name in others:
        reparametrize(apart, label(apart), {name: changes[name]})
    assert (difference(together, apart) > MOVED) != trivial(changes[last].encode)
    reparametrize(apart, label(apart), {last: changes[last]})
    assert difference(together, apart) <= tolerance(torch.float64, layout.depth)


@fewer
@given(model=tiny_models(), data=st.data())
def test_an_element_then_its_inverse_gives_the_weights_back(model, data):
    changed, layout = canonical_copy(model, **data.draw(forms(model), label="form"))
    before = copy.deepcopy(changed)
    bases = draw_bases(data, layout, least=1)
    reparametrize(changed, layout, rotations(bases))
    assert (difference(before, changed) > MOVED) != all(trivial(A) for A in bases.values())
    inverses = {id(A): as_operator(torch.linalg.inv(A.matrix())) for A in bases.values()}
    back = {n: moved(layout, bases, n, inverses[id(A)]) for n, A in bases.items()}
    reparametrize(changed, label(changed), rotations(back))
    assert difference(before, changed) <= tolerance(torch.float64, layout.depth)


def trivial(A: Operator) -> bool:
    """Whether an element is the identity, as permutations of few things often are."""
    return in_group(Group.IDENTITY, A)


def moved(layout: Layout, bases: Mapping[str, Operator], name: str, A: Operator) -> Operator:
    """What changes a space's copies, for the order in which a permutation of KV groups has put them."""
    groups = bases.get(f"heads.{name.split('.')[1]}")
    return (
        A
        if groups is None or layout.spaces[name].kind not in ("vo", "qk")
        else A.take(groups.picks[0])
    )


@fewer
@given(model=tiny_models(), seed=seeds)
def test_kv_groups_may_move_before_their_copies_change_or_in_the_same_step(model, seed):
    together, layout = canonical_copy(model, fold=True, tie="untie")
    apart, wrong = copy.deepcopy(together), copy.deepcopy(together)
    bases = elements(layout, layout.select(["heads", "vo", "qk"]), seed)
    reparametrize(together, layout, rotations(bases))
    for changed, follow in ((apart, True), (wrong, False)):
        reparametrize(changed, layout, rotations({n: bases[n] for n in layout.select(["heads"])}))
        inner = {n: bases[n] for n in layout.select(["vo", "qk"])}
        then = {n: moved(layout, bases, n, A) if follow else A for n, A in inner.items()}
        reparametrize(changed, label(changed), rotations(then))
    assert difference(together, apart) <= tolerance(torch.float64, layout.depth)
    still = all(trivial(bases[n]) for n in layout.select(["heads"]))
    assert (difference(together, wrong) > MOVED) != still


def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest relative distance between two models' weights; infinite where their names differ."""
    a, b = weights(one), weights(other)
    if a.keys() != b.keys():
        return float("inf")
    return max(relative_error(a[name], b[name]) for name in a)


@fewer
@given(model=tiny_models(), data=st.data())
def test_shortcuts_lie_exactly_where_two_bases_meet(model, data):
    changed, layout = canonical_copy(model, fold=True, tie="untie")
    bases = draw_bases(data, layout)
    reparametrize(changed, layout, rotations(bases))
    meet = {e.stage for e in layout.edges if bases.get(e.source) is not bases.get(e.target)}
    assert label(changed).shortcuts == meet
    present = [m for m in changed.modules() if getattr(m, "shortcut", None) is not None]
    assert len(present) == len(meet)


@pytest.mark.parametrize(("by", "count"), [("global", 0), ("block", 3), ("stage", 6)])
def test_one_basis_needs_no_shortcut_and_one_per_block_needs_one_each(by, count):
    changed, layout = canonical_copy(tiny("llama", num_hidden_layers=3), fold=True, tie="untie")
    reparametrize(
        changed, layout, rotations(share(elements(layout, layout.points, 0), segments(layout, by)))
    )
    assert len(label(changed).shortcuts) == count


def test_a_shortcut_carries_one_change_out_and_the_next_one_in():
    model, layout = canonical_copy(tiny("llama"), fold=True, tie="untie")
    g = torch.Generator().manual_seed(0)
    oblique = {
        p: Change(*(torch.randn(1, 16, 5 + i, generator=g, dtype=torch.float64) for _ in range(2)))
        for i, p in enumerate(layout.points)
    }
    reparametrize(model, layout, oblique)
    for edge in layout.edges:
        expected = (
            oblique[edge.source].decode.matrix()[0].mT @ oblique[edge.target].encode.matrix()[0]
        )
        torch.testing.assert_close(model.get_submodule(edge.stage).shortcut.data, expected)
    again = {
        p: Change(*(torch.randn(1, 5 + i, 4, generator=g, dtype=torch.float64) for _ in range(2)))
        for i, p in enumerate(layout.points)
    }
    before = {e.stage: model.get_submodule(e.stage).shortcut.data for e in layout.edges}
    reparametrize(model, label(model), again)
    for edge in layout.edges:
        expected = (
            again[edge.source].decode.matrix()[0].mT
            @ before[edge.stage]
            @ again[edge.target].encode.matrix()[0]
        )
        torch.testing.assert_close(model.get_submodule(edge.stage).shortcut.data, expected)


@pytest.mark.parametrize("shared", [True, False])
def test_points_share_a_basis_by_identity_whatever_it_holds(shared):
    model = tiny("llama")
    layout = canonicalize(model, fold=True)
    blank = {p: Change.empty(layout.spaces[p], 9) for p in layout.points}
    reparametrize(model, layout, dict.fromkeys(blank, blank["x.0.0"]) if shared else blank)
    assert len(label(model).shortcuts) == (0 if shared else layout.depth)


# Slicing


@given(model=tiny_models(), data=st.data())
def test_a_sliced_model_is_the_dense_one_with_projectors_at_its_spaces(model, data):
    ids = tokens(data.draw(seeds, label="tokens"))
    options = data.draw(forms(model), label="form") | {"fold": True}
    sliced, layout = canonical_copy(model, **options)
    dense = copy.deepcopy(sliced)
    before = logits(dense, ids)
    changes, _ = draw_slices(data, layout)
    reparametrize(sliced, layout, changes)
    after = logits(sliced, ids)
    project(dense, layout, changes)
    assert relative_error(logits(dense, ids), after) <= tolerance(torch.float64, layout.depth)
    if any(c.width < c.encode.shape[1] for c in changes.values()):
        assert relative_error(before, after) > MOVED


@given(model=tiny_models(), data=st.data())
def test_counted_parameters_are_the_stored_ones(model, data):
    form = data.draw(forms(model), label="form")
    form["fold"] |= form["tie"] == "keep"
    dense = stored(model)
    layout = canonicalize(model, **form)
    assert layout.parameters({}).total == stored(model)
    assert (stored(model) == dense) or form["fold"]
    if not layout.folded:
        return
    changes, shared = draw_slices(data, layout)
    reparametrize(model, layout, changes)
    kept = {n: c.width for n, c in changes.items()}
    counted = layout.parameters(kept, shared)
    assert counted.total == stored(model)
    assert counted == label(model).parameters({})  # in every part
    assert counted.shortcuts == sum(
        p.numel() for n, p in model.named_parameters() if n.endswith("shortcut")
    )
    assert layout.kv_entries(kept) == label(model).kv_entries({})
    assert layout.flops(kept, shared) == label(model).flops({})
    narrowed = any(c.width < c.encode.shape[1] for c in changes.values())
    assert (layout.parameters({}, shared).total != stored(model)) == narrowed


# Depth: branches that go


def draw_drops(data: st.DataObject, model: PreTrainedModel, layout: Layout) -> dict[str, Change]:
    """Any branches to width 0, but for one attention, of the first one's window."""
    names = list(layout.branches.values())
    (_, first), *others = attentions(model, layout)
    same = [
        "heads.0",
        *(layout.branches[b] for b, a in others if a.sliding_window == first.sliding_window),
    ]
    safe = data.draw(st.sampled_from(same), label="stays")
    gone = subset(data, [n for n in names if n != safe], 0)
    return {n: Change.empty(layout.spaces[n], 0) for n in gone}


def nothing(y: Any) -> Any:
    """Zeros in the place of what a branch gives; attentions give their weights beside it."""
    return (torch.zeros_like(y[0]), *y[1:]) if isinstance(y, tuple) else torch.zeros_like(y)


def silence(model: PreTrainedModel, layout: Layout, gone: Mapping[str, Any]) -> None:
    """Make branches of a dense model write nothing."""
    for branch, space in layout.branches.items():
        if space in gone:
            model.get_submodule(branch).register_forward_hook(lambda _m, _a, y: nothing(y))


@given(model=tiny_models(), data=st.data())
def test_a_model_without_branches_is_the_dense_one_in_which_they_write_nothing(model, data):
    ids = tokens(data.draw(seeds, label="tokens"))
    short, layout = canonical_copy(model, fold=True, tie="untie")
    dense = copy.deepcopy(short)
    whole = logits(dense, ids)
    changes, _ = draw_slices(data, layout)
    # A stream that is cut also cuts what a silent branch would have read: slices elsewhere, rotations there.
    changes = {n: c for n, c in changes.items() if layout.spaces[n].kind != "residual"}
    gone = draw_drops(data, short, layout)
    points = rotations(share(elements(layout, layout.points, 0), segments(layout, data.draw(bys))))
    kept = {n: c for n, c in changes.items() if n not in gone}
    reparametrize(short, layout, kept | gone | points)
    project(dense, layout, kept)
    silence(dense, layout, gone)
    bound = tolerance(torch.float64, layout.depth)
    assert relative_error(logits(dense, ids), logits(short, ids)) <= bound
    if gone:
        assert relative_error(whole, logits(short, ids)) > MOVED
    now = label(short)
    widths = {n: c.width for n, c in (kept | gone).items()}
    assert layout.parameters(widths, {n: id(c) for n, c in points.items()}).total == stored(short)
    assert layout.flops(widths, {n: id(c) for n, c in points.items()}) == now.flops({})
    assert layout.kv_entries(widths) == now.kv_entries({})
    assert now.points == layout.points and now.stages({}) == layout.stages(widths)
    dead = [e.stage for e in layout.edges if e.stage not in now.stages({})]
    assert all(short.get_submodule(s).norm is None for s in dead)
    again = label(short)  # a shortened model's stream can be turned again
    reparametrize(short, again, rotations(elements(again, again.points, 5)))
    assert relative_error(logits(dense, ids), logits(short, ids)) <= bound


@fewer
@given(model=tiny_models(layers=(2, 3)), data=st.data())
def test_generation_with_and_without_a_cache_agrees_where_branches_are_gone(model, data):
    ids = tokens(data.draw(seeds, label="tokens"))
    short, layout = canonical_copy(model, fold=True, tie="untie")
    gone = draw_drops(data, short, layout)
    dense = copy.deepcopy(short)
    silence(dense, layout, gone)
    reparametrize(short, layout, gone)
    one, scores = generate(short, ids, cache=True)
    for other, cache in ((short, False), (dense, False)):
        same, close = generate(other, ids, cache)
        assert torch.equal(one, same)
        assert relative_error(scores, close) <= tolerance(torch.float64, layout.depth)


def attentions(model: PreTrainedModel, layout: Layout) -> list[tuple[str, Any]]:
    return [
        (b, model.get_submodule(b)) for b, s in layout.branches.items() if s.startswith("heads")
    ]


def test_a_cache_counts_its_tokens_in_the_first_attention_that_is_left():
    model, layout = canonical_copy(tiny("opt", num_hidden_layers=3), fold=True, tie="untie")
    reparametrize(model, layout, {"heads.0": Change.empty(layout.spaces["heads.0"], 0)})
    left = attentions(model, label(model))
    assert [a.layer_idx for _, a in left] == [0, 1]
    _, scores = generate(model, tokens(), cache=True)
    bound = tolerance(torch.float64, layout.depth)
    assert relative_error(scores, generate(model, tokens(), cache=False)[1]) <= bound
    for _, attention in left:  # the control: the slots that they had
        attention.layer_idx += 1
    assert relative_error(scores, generate(model, tokens(), cache=True)[1]) > MOVED


def test_windows_that_differ_keep_their_own_slots_of_the_cache():
    options = {
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 2,
        "num_hidden_layers": 4,
    }
    model, layout = canonical_copy(tiny("qwen2", **options), fold=False, tie="untie")
    gone = {n: Change.empty(layout.spaces[n], 0) for n in ("heads.0", "heads.2")}
    reparametrize(model, layout, gone)
    left = [(a.layer_idx, a.sliding_window) for _, a in attentions(model, label(model))]
    assert left == [(0, None), (2, 3)]
    _, scores = generate(model, tokens(), cache=True)
    other = generate(model, tokens(), cache=False)[1]
    assert relative_error(scores, other) <= tolerance(torch.float64, layout.depth)
    last = {"heads.1": gone["heads.0"]}
    before = weights(model)
    with pytest.raises(InvarianceError, match="every attention that fills the first slot"):
        reparametrize(model, label(model), last)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# Generation


@torch.no_grad()
def generate(model: PreTrainedModel, ids: Tensor, cache: bool) -> tuple[Tensor, Tensor]:
    """Greedy tokens and the logits that chose them, for a batch whose second row is padded on the left."""
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options = dict(
        max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    out = model.generate(input_ids=ids, attention_mask=mask, use_cache=cache, **options)
    return out.sequences, torch.stack(out.logits)


@fewer
@given(model=tiny_models(), data=st.data())
def test_generation_with_and_without_a_cache_agrees_rotated_and_sliced(model, data):
    ids = tokens(data.draw(seeds, label="tokens"))
    dense = verify.exact_copy(model)
    sequence, scores = generate(dense, ids, cache=True)
    rotated, layout = canonical_copy(model, fold=True, tie="untie")
    reparametrize(rotated, layout, rotations(draw_bases(data, layout)))
    sliced, _ = canonical_copy(model, fold=True, tie="untie")
    changes, _ = draw_slices(data, layout)
    reparametrize(sliced, layout, changes)
    bound = tolerance(torch.float64, layout.depth)
    for cache in (True, False):
        same, close = generate(rotated, ids, cache)
        assert torch.equal(sequence, same) and relative_error(scores, close) <= bound
    one, its = generate(sliced, ids, cache=True)
    other, others = generate(sliced, ids, cache=False)
    assert torch.equal(one, other) and relative_error(its, others) <= bound
    if any(c.width < c.encode.shape[1] for c in changes.values()):
        assert relative_error(scores[0], its[0]) > MOVED


@pytest.mark.parametrize("family", ["llama", "opt", "phi", "qwen3", "gemma3_text"])
def test_generation_works_at_different_widths_in_every_space(family):
    model = tiny(family, num_hidden_layers=2)
    sliced, layout = canonical_copy(model, fold=True, tie="untie")
    changes = rotations(elements(layout, layout.spaces, 0))
    kept = {
        n: s.dim
        if s.normed
        else s.dim - 2
        if n.startswith("qk") and s.rotary
        else max(1, s.dim - 1 - i % 3)
        for i, (n, s) in enumerate(layout.spaces.items())
    }
    if family == "phi":
        kept |= {"qk.0": 3, "qk.1": 2}  # two rotary dims stay, one or none of the others
    reparametrize(
        sliced, layout, {n: cut(c, kept[n], layout.spaces[n]) for n, c in changes.items()}
    )
    assert {n: s.dim for n, s in label(sliced).spaces.items()} == kept
    one, scores = generate(sliced, tokens(), cache=True)
    other, others = generate(sliced, tokens(), cache=False)
    assert torch.equal(one, other)
    assert relative_error(scores, others) <= tolerance(torch.float64, layout.depth)


def test_a_fault_in_the_cached_keys_is_noticed():
    model = verify.exact_copy(tiny("llama"))
    bound = tolerance(torch.float64, label(model).depth)
    _, scores = generate(model, tokens(), cache=False)
    assert relative_error(scores, generate(model, tokens(), cache=True)[1]) <= bound
    keys = model.get_submodule(label(model).edges[0].stage).attention.k
    keys.register_forward_hook(lambda _, args, k: k.roll(1, 0) if args[0].shape[1] == 1 else k)
    assert relative_error(scores, generate(model, tokens(), cache=True)[1]) > MOVED


# The certificate


@fewer
@given(model=tiny_models(), data=st.data())
def test_certify_passes_with_random_bases_and_its_control_fails(model, data):
    form = data.draw(forms(model), label="form")
    _, layout = canonical_copy(model, **form)
    bases = draw_bases(data, layout, least=1)
    untouched = weights(model)
    certificate = verify.certify(model, bases, tokens(data.draw(seeds, label="tokens")), **form)
    assert certificate.passed
    assert certificate.tolerance == tolerance(torch.float64, layout.depth, CHANGED)
    assert certificate.negative_control > MOVED and certificate.spaces == len(bases)
    assert all(torch.equal(p, untouched[n]) for n, p in model.named_parameters())


@fewer
@given(model=tiny_models(), data=st.data())
def test_certify_fails_on_a_basis_outside_its_group(model, data):
    _, layout = canonical_copy(model, fold=True, tie="untie")
    bases = elements(layout, layout.spaces, data.draw(seeds, label="seed"))
    kinds = [
        k for k in KINDS if k not in ("vo", "heads") and not (k == "qk" and rotary(layout) == 0)
    ]
    name = data.draw(
        st.sampled_from(layout.select([data.draw(st.sampled_from(kinds))])), label="space"
    )
    noise = torch.randn(
        bases[name].shape, generator=layout.spaces[name].generator(0), dtype=torch.float64
    )
    bases[name] = as_operator(bases[name].matrix() + 0.1 * noise)
    assert not layout.spaces[name].contains(bases[name])
    space = layout.spaces[name]
    if (
        space.rotary and not space.normed
    ):  # what does not keep pairs whole is no change of such a space at all
        with pytest.raises(InvarianceError, match="does more than choose among"):
            verify.certify(model, bases, tokens(), fold=True)
        return
    certificate = verify.certify(model, bases, tokens(), fold=True)
    assert not certificate.passed and certificate.relative_error > 1000 * certificate.tolerance


def rotary(layout: Layout) -> int:
    return next(s.rotary for s in layout.spaces.values() if s.kind == "qk")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mlp.7", Change(torch.ones(1, 8, 8), torch.ones(1, 8, 8)), "no space 'mlp.7'"),
        (
            "vo.0",
            Change(torch.ones(1, 4, 2), torch.ones(1, 4, 2)),
            r"would fit: \(copies, dim, width\)",
        ),
        (
            "heads.0",
            Change(torch.ones(1, 2, 1), torch.ones(1, 2, 1)),
            "mixes KV groups, because every head",
        ),
        (
            "heads.0",
            Change(torch.eye(2)[None], torch.ones(1, 8, 8)),
            r"would fit: \(copies, dim, width\)",
        ),
        (
            "vo.0",
            Change(torch.ones(2, 4, 0), torch.ones(2, 4, 0)),
            "cuts space 'vo.0' to width 0, and no branch",
        ),
        (
            "qk.0",
            Change(torch.ones(2, 4, 1), torch.ones(2, 4, 1)),
            "space 'qk.0', to 1 dims, does more",
        ),
        ("qk.0", Change(*[torch.eye(4)[None, :, :2].repeat(2, 1, 1).double()] * 2), "the 2 pairs"),
        (
            "qk.0",
            Change(torch.eye(4).repeat(2, 1, 1), torch.ones(2, 4, 4)),
            "does more than choose",
        ),
    ],
)
def test_a_change_that_does_not_fit_is_refused_and_changes_nothing(
    name: str, change: Change, message: str
) -> None:
    model, layout = canonical_copy(tiny("llama"), fold=True, tie="untie")
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(InvarianceError, match=message):
        reparametrize(model, layout, {name: change})
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
