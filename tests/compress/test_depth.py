"""KV groups and depth through whole runs: choices by brute force, what is saved loads, what goes is made up for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import VOCABULARY, model_of, save_tokens, stored_numbers
from sliced import taken
from tiny import tiny
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from invariance.calibrate import walk
from invariance.calibrate.beside import Following
from invariance.calibrate.enter import enter
from invariance.calibrate.moments import Moments, reader_moment
from invariance.calibrate.statistic import Statistic
from invariance.compress.planner import plan
from invariance.core.change import Change
from invariance.core.errors import InputError
from invariance.core.group import Group
from invariance.core.space import Space
from invariance.io.checkpoint import InvarianceForCausalLM
from invariance.method.budget import Bill
from invariance.method.interfaces import find
from invariance.model.canonical import canonicalize
from invariance.model.reparametrize import reparametrize
from invariance.model.verify import exact_copy, logits, relative_error, tolerance
from invariance.model.working import Whole
from invariance.recipe.recipe import Recipe
from invariance.run.outcome import Outcome, outcome

IDS = torch.arange(1, 25)[None] % VOCABULARY
DEPTH = {"spaces": ["heads", "mlp"], "widths": {"min": 0}}
SHORT = DEPTH | {"select": {"shortgpt": {"blocks": 2}}}
GROUPS = {
    "spaces": "heads",
    "rotate": "permute",
    "select": {"uniform": {"width": 1}},
    "slice": "least_squares",
}
GONE = {"select": {"uniform": {"width": 0}}, "widths": {"min": 0}}
STREAM = {"spaces": "residual", "rotate": "pca", "select": {"uniform": {"width": 24}}}


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("depth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.chdir(root)
        save_tokens(root / "tokens.npy")
        yield


@cache
def dense(family: str = "llama") -> PreTrainedModel:
    return model_of(family, num_hidden_layers=4)


def recipe(*steps: Mapping[str, Any], **keys: Any) -> Recipe:
    calibrate = {"data": "tokens.npy", "dtype": "float32"}
    return Recipe.from_dict({"model": "m", "calibrate": calibrate, "steps": list(steps)} | keys)


def made(*steps: Mapping[str, Any], family: str = "llama", **keys: Any) -> Outcome:
    return outcome(dense(family), recipe(*steps, **keys), evaluate=False)


def gone(report: Mapping[str, Any]) -> set[str]:
    return {n for n, k in report["widths"].items() if k == 0}


# Choices


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_shortgpt_drops_the_blocks_whose_streams_turn_least_by_brute_force(family: str) -> None:
    model, ids = dense(family), torch.from_numpy(np.load("tokens.npy"))
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    found: dict[int, Tensor] = {}

    def turn(i: int, x: Tensor, y: Any) -> None:
        y = y[0] if isinstance(y, tuple) else y
        found[i] = 1 - cosine_similarity(x, y, dim=-1).mean()

    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda _m, a, y, i=i: turn(i, a[0], y))
    logits(model, ids)
    for block in blocks:
        block._forward_hooks.clear()
    least = sorted(found, key=lambda i: found[i].item())
    report = made(SHORT, family=family).report
    assert gone(report) == {f"{kind}.{i}" for i in least[:2] for kind in ("heads", "mlp")}


def bill(
    losses: Mapping[frozenset[int], float] | None = None, protect: tuple[int, ...] = ()
) -> tuple[Bill, list[Space]]:
    spaces = [
        Space(f"{kind}.{i}", kind, 4, Group.PERMUTATION, block=i)
        for i in range(4)
        for kind in ("heads", "mlp")
    ]
    allowed = {s: (4,) if int(s.name[-1]) in protect else (0, 4) for s in spaces}

    def lost(widths: Mapping[Space, int]) -> frozenset[int]:
        return frozenset(int(s.name[-1]) for s, k in widths.items() if k == 0)

    influence = {s: [0.3, 0.1, 0.2, 0.4][int(s.name[-1])] for s in spaces}
    amounts = {"parameters": lambda w: 100.0 - 10 * len(lost(w))}
    return Bill(
        amounts, {}, allowed, None if losses is None else lambda w: losses[lost(w)], influence
    ), spaces


def blocks_gone(widths: Mapping[Space, int]) -> set[int]:
    return {int(s.name[-1]) for s, k in widths.items() if k == 0}


def test_blocks_go_until_the_budget_is_met_and_protected_ones_stay() -> None:
    cost, spaces = bill()
    spectra = dict.fromkeys(spaces)
    assert blocks_gone(find("select", "shortgpt")().allocate(spectra, cost, 85)) == {1, 2}
    assert blocks_gone(find("select", "shortgpt")().allocate(spectra, cost, 100)) == set()
    assert blocks_gone(find("select", "shortgpt")(blocks=3).allocate(spectra, cost, None)) == {
        0,
        1,
        2,
    }
    cost, _ = bill(protect=(1,))
    assert blocks_gone(find("select", "shortgpt")(blocks=2).allocate(spectra, cost, None)) == {0, 2}
    with pytest.raises(InputError, match="4 blocks cannot go: of 4, 3 may"):
        find("select", "shortgpt")(blocks=4).allocate(spectra, cost, None)
    poor = replace(cost, limits={"parameters": 60}, dense={"parameters": 100})
    with pytest.raises(
        InputError, match=r"leave 70\. Raise it to `parameters: 0\.7`"
    ):  # one block stays
        find("select", "shortgpt")().allocate(spectra, poor, 60)


def test_sleb_is_greedy_with_what_went_before_in_place() -> None:
    losses = {frozenset(s): 9.0 for s in [(0, 1), (1, 2), (0, 2), (0, 3), (2, 3)]}
    losses |= (
        {frozenset(): 0.5}
        | {frozenset({i}): x for i, x in enumerate([3.0, 1.0, 2.0, 4.0])}
        | {frozenset({1, 3}): 5.0}
    )
    cost, spaces = bill(losses)
    assert blocks_gone(
        find("select", "sleb")(blocks=2).allocate(dict.fromkeys(spaces), cost, None)
    ) == {1, 3}
    assert blocks_gone(find("select", "sleb")().allocate(dict.fromkeys(spaces), cost, 95)) == {1}


def test_sleb_measures_what_the_model_loses() -> None:
    report = made(DEPTH | {"select": {"sleb": {"blocks": 2}}}).report
    assert len(gone(report)) == 4
    assert report["search"]["evaluations"] == 4 + 3 + 1  # the last of the model as it is


@pytest.mark.parametrize(
    ("step", "keys", "message"),
    [
        (SHORT | {"widths": {"min": 1}}, {}, "may not be cut to width 0"),
        (SHORT | {"select": {"shortgpt": {"blocks": 4}}}, {}, "4 blocks cannot go"),
        (GONE | {"spaces": "heads"}, {}, "no attention would be left"),
        (GONE | {"spaces": "vo"}, {}, "no branch vanishes with space 'vo.0'"),
        (GONE | {"spaces": "residual"}, {}, "no branch vanishes with space 'x.0.0'"),
        ({"spaces": "heads", "rotate": "pca"}, {}, "because every head has a softmax of its own"),
    ],
)
def test_what_cannot_go_is_refused_with_its_reason(
    step: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        made(step, **keys)


# Checkpoints

CASES: dict[
    str, tuple[list[dict[str, Any]], set[str]]
] = {  # and the families that have a stock form of it
    "blocks": ([SHORT], {"llama", "opt", "phi"}),
    "blocks and the stream": ([SHORT, STREAM], {"llama"}),
    "blocks and a basis per stage": ([SHORT, STREAM | {"segments": "stage"}], set()),
    "one branch": ([GONE | {"spaces": "mlp.1"}], set()),
    "an attention": ([GONE | {"spaces": "heads.0"}], set()),
    "groups": ([GROUPS], {"llama", "phi"}),
    "groups and their values": (
        [GROUPS, {"spaces": "vo", "rotate": "head_svd", "select": {"uniform": {"width": 6}}}],
        set(),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_what_is_saved_loads_with_the_same_logits(family: str, name: str, tmp_path: Path) -> None:
    steps, stock = CASES[name]
    found = made(*steps, family=family)
    found.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    about = found.report["model"]
    assert about["stock"] == (family in stock), about["why_not_stock"]
    assert isinstance(loaded, InvarianceForCausalLM) != about["stock"]
    assert relative_error(logits(found.model, IDS), logits(loaded, IDS)) <= tolerance(
        torch.float32, 8
    )
    assert stored_numbers(tmp_path) == found.report["parameters"]["sliced"]["total"]
    said = [
        m.generate(IDS[:, :5], max_new_tokens=6, do_sample=False, use_cache=c)[0].tolist()
        for m, c in ((loaded, True), (loaded, False), (found.model, True))
    ]
    assert said[0] == said[1] == said[2]
    assert relative_error(logits(dense(family), IDS), logits(loaded, IDS)) > 1e-4
    entries = found.report["kv_bytes_per_token"]["sliced"] / 4
    kept = loaded(IDS, use_cache=True).past_key_values
    held = sum(
        t.numel()
        for layer in kept.layers
        if layer.is_initialized
        for t in (layer.keys, layer.values)
    )
    assert held == entries * IDS.numel()


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_stock_checkpoint_has_fewer_layers_or_heads(family: str, tmp_path: Path) -> None:
    made(SHORT, family=family).model.save_pretrained(tmp_path / "short")
    config = AutoConfig.from_pretrained(tmp_path / "short")
    assert (config.model_type, config.num_hidden_layers, config.num_attention_heads) == (
        family,
        2,
        4,
    )
    made(GROUPS, family=family).model.save_pretrained(tmp_path / "groups")
    config = AutoConfig.from_pretrained(tmp_path / "groups")
    heads = (
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    assert heads == (4, 2, 1, 8)


def test_a_lost_branch_is_named_where_no_stock_config_holds_the_rest() -> None:
    why = made(GONE | {"spaces": "mlp.1"}).report["model"]["why_not_stock"]
    assert why == "block 1 has lost its mlp and not all else"


# Who makes up for what is gone


def test_least_squares_makes_the_groups_that_stay_stand_for_all() -> None:
    model = exact_copy(dense())
    layout = canonicalize(model, fold=False)
    ids = torch.randint(1, VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(1))
    space = layout.spaces["heads.1"]
    parts = Whole(model, layout)
    batches = enter(parts, [(ids, torch.ones_like(ids, dtype=torch.bool))], torch.float64)
    moments = taken(
        parts, batches, {space.name: frozenset({Statistic.SEEN.on(space)})}, torch.float64
    )
    moments = moments.merge(Moments({(space.name, Statistic.READERS): reader_moment(parts, space)}))
    read: list[Tensor] = []
    out = model.get_submodule(layout.edges[2].stage).attention.out
    behind = model.get_submodule(layout.edges[3].stage)
    handles = [
        m.register_forward_pre_hook(lambda _m, a: read.append(a[0].flatten(0, 1)))
        for m in (out, behind)
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    w = 1 / read[1].square().mean(-1, keepdim=True)
    z, W = read[0] * (w / w.mean()).sqrt(), out.weight.detach()
    energy = [(z[:, g] @ W[:, g].mT).square().sum(1).mean() for g in (slice(0, 16), slice(16, 32))]
    basis = find("rotate", "permute")().fit(space, moments)
    assert basis.energy[0].tolist() == pytest.approx(
        sorted((e.item() for e in energy), reverse=True)
    )
    stays = int(energy[1] > energy[0])
    kept = z[:, 16 * stays : 16 * stays + 16]
    best = torch.linalg.lstsq(kept, z @ W.mT).solution
    change = find("slice", "least_squares")(ridge=0.0).cut(space, basis, 1, moments)
    reparametrize(model, layout, {space.name: change})
    cut = model.get_submodule(layout.edges[2].stage).attention
    assert (cut.heads, cut.kv_heads) == (2, 1)
    torch.testing.assert_close(cut.out.weight.detach(), best.mT, rtol=1e-6, atol=1e-8)
    plain = (z @ W.mT - kept @ W[:, 16 * stays : 16 * stays + 16].mT).square().mean()
    assert (z @ W.mT - kept @ best).square().mean() < 0.95 * plain  # the control: nobody makes up


def stream(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What arrives before the final norm."""
    seen: list[Tensor] = []
    hook = lambda _m, a: seen.append(a[0].detach())  # noqa: E731
    handle = model.model.norm.register_forward_pre_hook(hook)
    logits(model, ids)
    handle.remove()
    return seen[0]


def test_the_last_writer_before_a_gap_is_refit_to_the_dense_stream_behind_it() -> None:
    """ReplaceMe: blocks 1 and 2 go; the MLP of block 0 takes over what they did."""
    model = exact_copy(dense())
    layout = canonicalize(model, fold=False)
    ids = torch.randint(1, VOCABULARY, (32, 24), generator=torch.Generator().manual_seed(1))
    batch = [(ids, torch.ones_like(ids, dtype=torch.bool))]
    names = {f"{kind}.{i}": frozenset() for i in (1, 2) for kind in ("heads", "mlp")}
    stay = [e.stage for e in layout.edges if e.block not in (1, 2)]

    def behind(lookahead: bool) -> tuple[PreTrainedModel, float]:
        """The model, and the error of its stream where block 3 begins."""
        cut = exact_copy(dense())
        canonicalize(cut, fold=False)
        parts = Whole(cut, layout)
        walk.sequential(
            parts,
            enter(parts, batch, torch.float64),
            torch.float64,
            walk.Cutting(names, lambda n, _: Change.empty(layout.spaces[n], 0)),
            follow=Following(readers=False, stay=stay if lookahead else None),
        )
        arrived = []
        for m in (model, cut):
            found: list[Tensor] = []
            handle = m.get_submodule(layout.edges[6].stage).register_forward_pre_hook(
                lambda _m, a, f=found: f.append(a[0])
            )
            logits(m, ids)
            handle.remove()
            arrived.append(found[0])
        weight = arrived[0].square().mean(-1, keepdim=True)
        return cut, ((arrived[0] - arrived[1]).square() / weight).mean().item()

    (short, error), (_, without) = behind(True), behind(False)
    assert error < 0.98 * without
    whole = {n: p for n, p in model.named_parameters()}
    stages = layout.edges
    changed = {n for n, p in short.named_parameters() if not torch.equal(p, whole[n])}
    assert f"{stages[1].stage}.mlp.down.weight" in changed
    assert changed <= {
        f"{stages[i].stage}.{w}.weight" for i in (0, 1, 6, 7) for w in ("attention.out", "mlp.down")
    }


def test_replacing_blocks_loses_less_than_dropping_them() -> None:
    report = {order: made(SHORT, order=order) for order in ("oneshot", "dense_target")}
    assert gone(report["oneshot"].report) == gone(report["dense_target"].report)
    errors = {
        o: relative_error(logits(dense(), IDS), logits(m.model, IDS)) for o, m in report.items()
    }
    assert errors["dense_target"] < errors["oneshot"]


def test_a_plan_counts_a_budget_that_depth_alone_can_meet() -> None:
    chart = plan(recipe(DEPTH | {"select": "shortgpt"}, budget={"parameters": 0.8}), dense().config)
    found = made(DEPTH | {"select": "shortgpt"}, budget={"parameters": 0.8}).report
    assert found["parameters"]["sliced"]["total"] <= 0.8 * chart.dense.parameters({}).total
    assert found["kv_bytes_per_token"]["sliced"] < found["kv_bytes_per_token"]["dense"]


WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 3,
    "max_window_layers": 1,
    "num_hidden_layers": 4,
}


@pytest.mark.parametrize(
    ("step", "refused"),
    [
        (SHORT, True),  # block 0 might go, and it alone sees everything
        (SHORT | {"widths": {"min": 0, "protect": {"first": 1}}}, False),
        (GONE | {"spaces": "heads.0"}, True),
        (GONE | {"spaces": "heads.1"}, False),
        (DEPTH | {"select": {"uniform": {"keep": 1.0}}}, False),
    ],
)
def test_a_plan_refuses_to_let_the_attention_go_in_whose_slot_a_cache_counts(
    step: dict[str, Any], refused: bool
) -> None:
    config = tiny("qwen2", **WINDOWS).config
    asked = Recipe.from_dict({"model": "m", "calibrate": {"data": "tokens.npy"}, "steps": [step]})
    if not refused:
        plan(asked, config)
        return
    with pytest.raises(
        InputError, match=r"cache counts its tokens where the attention of block 0 writes.*protect"
    ):
        plan(asked, config)
    plan(asked, tiny("qwen2", **WINDOWS | {"max_window_layers": 0}).config)  # all windows alike


# Depth and width in one recipe

NARROW = {"spaces": "mlp", "rotate": "permute", "slice": "least_squares"}


@pytest.mark.parametrize("order", ["oneshot", "sequential", "dense_target"])
@pytest.mark.parametrize("share", ["keep", "budget"])
def test_a_later_step_cuts_what_a_selector_of_depth_leaves(
    order: str, share: str, tmp_path: Path
) -> None:
    """The same blocks go as alone; their MLPs with them, though only the later step has those."""
    keys = {"order": order} | ({"budget": {"parameters": 0.4}} if share == "budget" else {})
    select = "uniform" if share == "budget" else {"uniform": {"keep": 0.5}}
    alone = made(SHORT, order=order)
    both = made(SHORT, NARROW | {"select": select}, **keys)
    assert gone(both.report) == gone(alone.report) != set()
    left = {n: k for n, k in both.report["widths"].items() if n.startswith("mlp") and k}
    (width,) = set(left.values())
    dim = both.report["dims"]["mlp.0"]
    assert width == dim // 2 if share == "keep" else 0 < width < dim
    sizes = both.report["parameters"]
    total = sum(p.numel() for p in both.model.parameters())
    assert sizes["sliced"]["total"] == total < alone.report["parameters"]["sliced"]["total"]
    assert (
        share == "keep" or 0.38 * sizes["dense"]["total"] < total <= 0.4 * sizes["dense"]["total"]
    )
    assert both.report["model"]["stock"] and both.report["exactness"]["passed"]
    both.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(both.model, IDS), logits(loaded, IDS))


@pytest.mark.parametrize("segments", ["global", "stage"])
@pytest.mark.parametrize("order", ["oneshot", "sequential", "dense_target"])
def test_the_stream_is_cut_behind_blocks_that_go(order: str, segments: str, tmp_path: Path) -> None:
    """In walking orders its points change one by one, when branches that read them are gone already."""
    made_ = made(SHORT, STREAM | {"segments": segments}, order=order)
    report = made_.report
    assert len(gone(report)) == 4 and report["widths"]["x.4.0"] == 24
    assert (
        sum(p.numel() for p in made_.model.parameters()) == report["parameters"]["sliced"]["total"]
    )
    made_.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert relative_error(logits(made_.model, IDS), logits(loaded, IDS)) <= tolerance(
        torch.float32, 8
    )


def test_widths_are_measured_with_the_blocks_gone_that_went_before() -> None:
    """Curves of MLPs that stay, on the model without what SLEB let go; both losses add up to the prediction."""
    sleb = DEPTH | {"select": {"sleb": {"blocks": 1}}}
    found = made(
        sleb, NARROW | {"select": {"sensitivity": {"points": 1}}}, budget={"parameters": 0.7}
    ).report
    blocks = {n.split(".")[1] for n in gone(found)}
    assert len(blocks) == 1 and len(gone(found)) == 2
    assert any(0 < k < found["dims"][n] for n, k in found["widths"].items() if n.startswith("mlp"))
    alone = made(sleb).report
    assert alone["predicted"]["loss"] is not None and gone(alone) == gone(found)
    assert found["predicted"]["loss"] >= alone["predicted"]["loss"]
    assert found["search"]["evaluations"] > alone["search"]["evaluations"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((NARROW | {"select": {"uniform": {"keep": 0.5}}}, SHORT), "already changed by step 0"),
        (
            (SHORT, *2 * (NARROW | {"select": {"uniform": {"keep": 0.5}}},)),
            "already changed by step 1",
        ),
        (
            (DEPTH | {"select": "shortgpt"}, NARROW | {"select": {"uniform": {"keep": 0.5}}}),
            "so how much goes",
        ),
        (
            (SHORT | {"rotate": "permute"}, NARROW | {"select": {"uniform": {"keep": 0.5}}}),
            "Remove `rotate` here",
        ),
        ((SHORT, NARROW | {"select": "uniform"}), "cannot be met"),
        (
            (DEPTH | {"select": {"sleb": {"blocks": 9}}}, NARROW | {"select": "uniform"}),
            "9 blocks cannot go",
        ),
    ],
)
def test_which_steps_cannot_share_spaces(
    steps: tuple[Mapping[str, Any], ...], message: str
) -> None:
    spends = any(s["select"] in ("uniform", "shortgpt") for s in steps)
    budget = {"budget": {"parameters": 0.2}} if spends else {}
    with pytest.raises(InputError, match=message):
        plan(recipe(*steps, **budget), dense().config)
