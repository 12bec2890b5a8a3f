"""Faults that must be caught: each test passes on the right path, then is wrong far beyond its tolerance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from projected import project
from tiny import canonical_copy, cut, elements, rotations, tiny, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from invariance.core import dense
from invariance.core.change import Change
from invariance.core.dense import as_operator
from invariance.core.errors import InvarianceError
from invariance.core.group import Group
from invariance.core.operator import Operator
from invariance.core.pick import Pick
from invariance.core.space import haar
from invariance.model import folding, verify
from invariance.model import reparametrize as operator
from invariance.model.axes import Axis, Role
from invariance.model.canonical import canonicalize
from invariance.model.folding import assign
from invariance.model.labels import label
from invariance.model.layout import Layout
from invariance.model.modules import Norm, Stage
from invariance.model.reparametrize import reparametrize
from invariance.model.verify import certify, logits, relative_error, tolerance

FAR = 1e5  # times the tolerance; what a fault must reach. Rounding stays below 1
RMS, LAYER = ("llama", "mistral", "qwen2", "qwen3"), ("opt", "phi")
Fault = Callable[[PreTrainedModel, Layout], None]


def nothing(model: PreTrainedModel, layout: Layout) -> None:
    """No fault at all."""


def error(
    model: PreTrainedModel,
    changes: Callable[[Layout], Mapping[str, Change]] | None = None,
    *,
    before: Fault = nothing,
    after: Fault = nothing,
    tie: str = "untie",
) -> float:
    """Logit error, in tolerances, of a changed model; a fault strikes its canonical form before or after."""
    reference = logits(verify.exact_copy(model), tokens())
    changed, layout = canonical_copy(model, fold=True, tie=tie)
    with torch.no_grad():
        before(changed, layout)
        reparametrize(changed, layout, (changes or everything)(layout))
        after(changed, label(changed))
    return relative_error(reference, logits(changed, tokens())) / tolerance(
        torch.float64, layout.depth
    )


def everything(layout: Layout) -> dict[str, Change]:
    """Elements of all spaces, the stream's orthogonal also where a fault has made its label say otherwise."""
    spaces = {n: replace(layout.spaces[n], group=Group.ORTHOGONAL) for n in layout.points}
    return rotations(
        elements(replace(layout, spaces={**layout.spaces, **spaces}), layout.spaces, seed=0)
    )


def of(kind: str, seed: int = 0) -> Callable[[Layout], dict[str, Change]]:
    return lambda layout: rotations(elements(layout, layout.select([kind]), seed))


def stages(model: PreTrainedModel) -> list[Stage]:
    return [m for m in model.modules() if isinstance(m, Stage)]


def norms(model: PreTrainedModel) -> list[Norm]:
    return [m for m in model.modules() if isinstance(m, Norm)]


# Centring


@pytest.mark.parametrize("family", RMS)
def test_centring_under_rmsnorm(family):
    model = tiny(family)
    assert error(model) <= 1
    assert error(model, before=folding._centre) > FAR


@pytest.mark.parametrize("family", LAYER)
@pytest.mark.parametrize("centred", [False, True])
def test_forgotten_centring_under_layernorm(family, centred, monkeypatch):
    def forget(model: PreTrainedModel, layout: Layout) -> None:
        for norm in norms(model):
            norm.centred = centred  # a mean that is subtracted in a rotated basis is another's

    assert error(tiny(family)) <= 1
    monkeypatch.setattr(folding, "_centre", forget)
    assert error(tiny(family)) > FAR


@pytest.mark.parametrize("family", LAYER)
def test_any_single_writer_left_uncentred(family):
    model = tiny(family, num_hidden_layers=1)
    twin, layout = canonical_copy(model, fold=False, tie="untie")
    writers = [
        (name, i)
        for name, axes in layout.axes.items()
        for i, a in enumerate(axes)
        if a is not None and a.role is Role.WRITE and layout.spaces[a.space].kind == "residual"
    ]
    assert len(writers) == {"opt": 2 + 4, "phi": 1 + 4}[family]
    assert error(model) <= 1
    for name, i in writers:
        mean = twin.get_parameter(name).mean(i, keepdim=True)
        assert error(model, before=lambda m, _, n=name, u=mean: m.get_parameter(n).add_(u)) > FAR, (
            name
        )


# Norms


@pytest.mark.parametrize("family", RMS + LAYER)
def test_norm_eps_off_by_a_millionth(family):
    model = tiny(family)
    assert error(model) <= 1
    for i in (0, 1, -1):

        def off(model: PreTrainedModel, layout: Layout, i: int = i) -> None:
            norms(model)[i].eps += 1e-6

        assert error(model, after=off) > FAR, i


@pytest.mark.parametrize("family", LAYER)
def test_norm_bias_not_folded_into_reader_biases(family, monkeypatch):
    def forget(norm: Norm, readers: list[nn.Linear]) -> None:
        norm.bias = None
        fold(norm, readers)

    fold = folding.fold_norm
    assert error(tiny(family)) <= 1
    monkeypatch.setattr(folding, "fold_norm", forget)
    assert error(tiny(family)) > FAR


def test_norm_bias_folded_where_linear_layers_had_none(monkeypatch):
    model = tiny("opt", enable_bias=False)
    assert error(model) <= 1

    def forget(model: PreTrainedModel, layout: Layout) -> None:
        stages(model)[0].attention.v.bias = None

    assert error(model, after=forget) > FAR


@pytest.mark.parametrize("family", RMS + LAYER)
def test_norm_gain_not_folded_into_one_reader(family, monkeypatch):
    fold = folding.fold_norm
    assert error(tiny(family)) <= 1
    monkeypatch.setattr(folding, "fold_norm", lambda norm, readers: fold(norm, readers[:-1]))
    assert error(tiny(family)) > FAR


@pytest.mark.parametrize("family", RMS + LAYER)
def test_mean_square_over_the_kept_width_in_place_of_the_original(family):
    dense, layout = canonical_copy(tiny(family), fold=True, tie="untie")
    sliced, _ = canonical_copy(tiny(family), fold=True, tie="untie")
    changes = {p: cut(c, 11) for p, c in of("residual")(layout).items()}
    reparametrize(sliced, layout, changes)
    project(dense, layout, changes)
    reference, bound = logits(dense, tokens()), tolerance(torch.float64, layout.depth)
    assert relative_error(reference, logits(sliced, tokens())) <= bound
    for norm in norms(sliced):
        norm.d = 11
    assert relative_error(reference, logits(sliced, tokens())) > FAR * bound


# Norms behind branches and on heads


def family_error(before: Fault = nothing) -> float:
    """How far the rewritten model is from its family, in tolerances of the families' float32 norms, after a fault."""
    model = tiny("gemma3_text")
    twin, layout = canonical_copy(model, fold=False, tie="untie")
    with torch.no_grad():
        before(twin, layout)
    return relative_error(logits(model, tokens()), logits(twin, tokens())) / tolerance(
        torch.float32, layout.depth
    )


@pytest.mark.parametrize("part", ["post", "attention.q_norm", "attention.k_norm"])
def test_a_norm_behind_a_branch_or_on_heads_is_left_out(part):
    def forget(model: PreTrainedModel, layout: Layout) -> None:
        path = f"{layout.edges[0].stage}.{part}"
        model.set_submodule(path, nn.Identity())

    assert family_error() <= 1
    assert family_error(forget) > 10


def test_a_gain_of_one_plus_w_taken_for_w():
    def forget(model: PreTrainedModel, layout: Layout) -> None:
        for norm in norms(model):
            norm.offset = 0.0

    assert error(tiny("gemma3_text"), signed) <= 1
    assert error(tiny("gemma3_text"), signed, after=forget) > FAR


def signed(layout: Layout) -> dict[str, Change]:
    """Signed permutations of the stream, where norms with gains stand behind branches."""
    return rotations(elements(layout, layout.points, seed=0))


def test_the_gain_of_a_norm_behind_a_branch_that_does_not_move_with_the_stream():
    model = tiny("gemma3_text")

    def forget(changed: PreTrainedModel, layout: Layout) -> None:
        twin, _ = canonical_copy(model, fold=True, tie="untie")
        stages(changed)[0].post.gain = stages(twin)[0].post.gain

    assert error(model, signed) <= 1
    assert error(model, signed, after=forget) > FAR


def test_the_gain_of_a_norm_behind_a_branch_that_takes_the_sign_of_the_stream(monkeypatch):
    contract = operator.contract

    def with_sign(W: Tensor, dim: int, axis: Axis, change: Change) -> Tensor:
        return contract(W, dim, replace(axis, role=Role.WRITE), change)

    assert error(tiny("gemma3_text"), signed) <= 1
    monkeypatch.setattr(operator, "contract", with_sign)
    assert error(tiny("gemma3_text"), signed) > FAR


# Biases and shortcuts


@pytest.mark.parametrize(
    ("family", "kind", "weight"),
    [("opt", "residual", "out"), ("opt", "vo", "v"), ("opt", "qk", "q"), ("qwen2", "qk", "k")],
)  # a key bias under no rotary positions adds one number to all scores of a query: no function of it
def test_a_bias_that_is_not_changed_with_its_weight(family, kind, weight):
    model = tiny(family)

    def forget(changed: PreTrainedModel, layout: Layout) -> None:
        twin, _ = canonical_copy(model, fold=True, tie="untie")
        getattr(stages(changed)[0].attention, weight).bias = getattr(
            stages(twin)[0].attention, weight
        ).bias

    assert error(model, of(kind)) <= 1
    assert error(model, of(kind), after=forget) > FAR


@pytest.mark.parametrize("family", RMS + LAYER)
def test_a_missing_shortcut(family):
    model = tiny(family)
    assert error(model, of("residual")) <= 1
    for i in (0, -1):

        def drop(model: PreTrainedModel, layout: Layout, i: int = i) -> None:
            stages(model)[i].shortcut = None

        assert error(model, of("residual"), after=drop) > FAR, i


def test_a_shortcut_the_wrong_way_round():
    def flip(model: PreTrainedModel, layout: Layout) -> None:
        stages(model)[0].shortcut = nn.Parameter(stages(model)[0].shortcut.mT.contiguous())

    assert error(tiny("llama"), of("residual")) <= 1
    assert error(tiny("llama"), of("residual"), after=flip) > FAR


# The tie


@pytest.mark.parametrize("family", RMS)
def test_final_gain_folded_into_the_tied_table(family, monkeypatch):
    def fold_into_both(model: PreTrainedModel, layout: Layout, tie: str) -> None:
        arch = layout.architecture
        head = model.get_submodule(arch.head)
        folding.fold_norm(model.get_submodule(arch.final_norm), [head])
        model.get_submodule(arch.embed[0]).weight = head.weight

    model = tiny(family, tie_word_embeddings=True)
    assert error(model, tie="untie") <= 1 and error(model, tie="keep") <= 1
    monkeypatch.setattr(folding, "_fold_head", fold_into_both)
    assert error(model, lambda layout: {}) > FAR


def test_a_kept_tie_without_its_matrix():
    def forget(model: PreTrainedModel, layout: Layout) -> None:
        mix = model.get_submodule(f"{layout.architecture.final_norm}.1")
        mix.weight = nn.Parameter(torch.eye(len(mix.weight), dtype=torch.float64))

    model = tiny("llama", tie_word_embeddings=True)
    assert error(model, tie="keep") <= 1
    assert error(model, tie="keep", after=forget) > FAR


# Elements


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "mlp"),
        ("llama", "vo"),
        ("llama", "qk"),
        ("opt", "mlp"),
        ("opt", "qk"),
        ("phi", "qk"),
        ("phi", "vo"),
    ],
)
def test_readers_changed_by_the_element_in_place_of_its_inverse_transpose(family, kind):
    def same(layout: Layout) -> dict[str, Change]:
        return {
            name: Change(A, A)
            for name, A in elements(layout, layout.select([kind]), seed=0).items()
        }

    assert error(tiny(family), of(kind)) <= 1
    assert error(tiny(family), same) > FAR


def invertible(d: int, g: torch.Generator) -> Tensor:
    return (haar(d, g) * torch.linspace(0.5, 2, d, dtype=torch.float64)) @ haar(d, g)


def scales(d: int, g: torch.Generator) -> Tensor:
    return torch.diag(torch.linspace(0.5, 2, d, dtype=torch.float64))


def negative(d: int, g: torch.Generator) -> Tensor:
    return -scales(d, g)


def pairs_of_neighbours(d: int, g: torch.Generator) -> Tensor:
    return torch.block_diag(*(haar(2, g) for _ in range(d // 2)))


@pytest.mark.parametrize(
    ("family", "options", "kind", "outsider", "group"),
    [
        ("llama", {}, "mlp", haar, Group.MONOMIAL),
        ("llama", {}, "residual", invertible, Group.ORTHOGONAL),
        ("llama", {}, "residual", scales, Group.ORTHOGONAL),
        ("llama", {}, "qk", invertible, Group.ROTARY),
        ("llama", {}, "qk", haar, Group.ROTARY),
        ("llama", {}, "qk", pairs_of_neighbours, Group.ROTARY),
        ("phi", {"hidden_size": 32}, "qk", invertible, Group.ROTARY),
        ("phi", {"hidden_act": "gelu"}, "mlp", scales, Group.PERMUTATION),
        ("opt", {}, "mlp", negative, Group.POSITIVE_MONOMIAL),
        ("opt", {}, "mlp", haar, Group.POSITIVE_MONOMIAL),
        ("opt", {"activation_function": "gelu"}, "mlp", scales, Group.PERMUTATION),
        ("opt", {}, "residual", invertible, Group.ORTHOGONAL),
        ("qwen3", {}, "qk", haar, Group.IDENTITY),
        ("qwen3", {}, "qk", scales, Group.IDENTITY),
        ("gemma3_text", {}, "qk", pairs_of_neighbours, Group.IDENTITY),
        ("gemma3_text", {}, "x.1.0", haar, Group.SIGNED_PERMUTATION),
        ("gemma3_text", {}, "x.1.0", scales, Group.SIGNED_PERMUTATION),
    ],
)
def test_an_element_outside_the_group(family, options, kind, outsider, group, monkeypatch):
    model = tiny(family, **options)
    _, layout = canonical_copy(model, fold=True, tie="untie")
    name = layout.select([kind])[0]
    space = layout.spaces[name]
    assert space.group is group
    A = torch.stack([outsider(space.dim, space.generator(seed=c)) for c in range(space.copies)])
    assert space.contains(space.element(0)) and not space.contains(A)
    right = certify(model, {name: space.element(0)}, tokens(), fold=True)
    if space.rotary and not space.normed:
        with pytest.raises(InvarianceError, match="does more than choose among"):
            certify(model, {name: A}, tokens(), fold=True)
        monkeypatch.setattr(
            operator,
            "pairs_kept",
            lambda X, rotary: torch.arange(rotary // 2).repeat(X.copies, 1),
        )
    wrong = certify(model, {name: A}, tokens(), fold=True)
    assert right.passed and not wrong.passed
    assert wrong.relative_error > FAR * wrong.tolerance


# The linear algebra


def test_query_heads_grouped_across_key_value_heads(monkeypatch):
    model = tiny("llama", num_key_value_heads=2)
    assert error(model, of("vo")) <= 1 and error(model, of("qk")) <= 1
    monkeypatch.setattr(dense, "spread", lambda X, runs: X.repeat(runs // len(X), 1, 1))
    assert error(model, of("vo")) > FAR and error(model, of("qk")) > FAR


def test_query_heads_that_do_not_move_with_their_group(monkeypatch):
    model = tiny("llama", num_key_value_heads=2)
    assert error(model, swapped) <= 1
    contract = operator.contract

    def leave_queries(W: Tensor, dim: int, axis: Axis, change: Change) -> Tensor:
        queries = axis.space.startswith("heads.") and axis.role is Role.WRITE and len(W) == 16
        return W if queries else contract(W, dim, axis, change)

    monkeypatch.setattr(operator, "contract", leave_queries)
    assert error(model, swapped) > FAR


def test_query_heads_that_move_one_by_one_and_not_as_groups(monkeypatch):
    model = tiny("llama", num_key_value_heads=2)
    assert error(model, swapped) <= 1

    def every_second(X: Pick, grain: int) -> Operator:
        return as_operator(torch.kron(torch.eye(grain).double()[None], X.matrix()[0]))

    monkeypatch.setattr(Pick, "grained", every_second)
    assert error(model, swapped) > FAR


@pytest.mark.parametrize("name", ["k", "v"])
def test_keys_or_values_left_in_their_old_order(name):
    model = tiny("llama", num_key_value_heads=2)
    twin, _ = canonical_copy(model, fold=True, tie="untie")

    def forget(changed: PreTrainedModel, layout: Layout) -> None:
        path = f"{layout.edges[0].stage}.attention.{name}.weight"
        assign(changed, path, twin.get_parameter(path))

    assert error(model, swapped) <= 1
    assert error(model, swapped, after=forget) > FAR


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_copies_forgotten_when_their_groups_move(family, monkeypatch):
    model = tiny(family)

    def changes(layout: Layout) -> dict[str, Change]:
        return swapped(layout) | of("vo")(layout) | of("qk")(layout)

    assert error(model, changes) <= 1
    along = operator.along

    def forget(axis: Axis, all_of_them: Mapping[str, Change]) -> list[tuple[Axis, Change]]:
        found = along(axis, all_of_them)
        return (
            [*found[:-1], (axis, all_of_them[axis.space])]
            if axis.role is Role.READ and found
            else found
        )

    monkeypatch.setattr(operator, "along", forget)
    assert error(model, changes) > FAR


def swapped(layout: Layout) -> dict[str, Change]:
    """Every KV group in its neighbour's place."""
    eyes = {
        n: torch.eye(layout.spaces[n].dim, dtype=torch.float64)[None]
        for n in layout.select(["heads"])
    }
    return {n: Change.rotation(eye.roll(1, -1)) for n, eye in eyes.items()}


def test_a_gate_left_behind_when_its_channels_move():
    model = tiny("llama")

    def forget(changed: PreTrainedModel, layout: Layout) -> None:
        twin, _ = canonical_copy(model, fold=True, tie="untie")
        assign(changed, f"{layout.edges[1].stage}.mlp.gate.weight", stages(twin)[1].mlp.gate.weight)

    assert error(model, of("mlp")) <= 1
    assert error(model, of("mlp"), after=forget) > FAR


def test_a_rotation_of_a_stream_whose_norms_keep_their_gains():
    model = tiny("llama")
    _, layout = canonical_copy(model, fold=True, tie="untie")
    bases = elements(layout, layout.points, seed=0)
    assert certify(model, bases, tokens(), fold=True).passed
    assert not certify(model, bases, tokens(), fold=False).passed


def test_a_weight_off_by_a_billionth():
    def nudge(model: PreTrainedModel, layout: Layout) -> None:
        stages(model)[0].attention.out.weight[0, 0] += 1e-9

    assert error(tiny("llama")) <= 1
    assert error(tiny("llama"), after=nudge) > 1


def test_a_control_that_moves_nothing_fails_the_certificate(monkeypatch):
    model = tiny("llama")
    bases = verify.random_bases(canonicalize(verify.exact_copy(model), fold=True))
    assert certify(model, bases, tokens(), fold=True).passed
    monkeypatch.setattr(verify, "half", lambda layout, names, seed: {})
    still = certify(model, bases, tokens(), fold=True)
    assert still.relative_error <= still.tolerance and not still.passed
