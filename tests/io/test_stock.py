"""`stock: true`: widths that a config of plain transformers can hold, whichever selector spends the budget, or a refusal."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from folders import model_of
from sliced import data as data
from sliced import dense, recipe, tokens

from invariance.compress import plan as planning
from invariance.compress.pipeline import slice_model
from invariance.compress.planner import plan
from invariance.core.errors import InputError
from invariance.recipe.recipe import Recipe
from invariance.run.outcome import outcome

PROGRAMME = {"dynamic_programming": {"of": "absolute"}}


def step(
    spaces: str, rotate: Any, select: Any, cut: str = "truncate", **widths: Any
) -> dict[str, Any]:
    found = {"spaces": spaces, "rotate": rotate, "select": select, "slice": cut}
    return found | ({"widths": widths} if widths else {})


def mlp(select: Any = PROGRAMME, **widths: Any) -> dict[str, Any]:
    return step(
        "mlp",
        {"obs": {"metric": "fisher"}},
        select,
        "least_squares",
        **({"multiple_of": 4} | widths),
    )


def vo(select: Any = PROGRAMME, **widths: Any) -> dict[str, Any]:
    return step("vo", {"head_svd": {"metric": "fisher"}}, select, **widths)


def qk(select: Any = PROGRAMME, per: str = "model", **widths: Any) -> dict[str, Any]:
    return step("qk", {"rope_pairs": {"per": per, "metric": "fisher"}}, select, **widths)


def asked(*steps: dict[str, Any], stock: bool = True, **keys: Any) -> Recipe:
    return recipe(*steps, stock=stock, **({"budget": {"parameters": 0.8}} | keys))


SPENDING: dict[str, Any] = {
    "programme": PROGRAMME,
    "energy": {"global_energy": {"of": "absolute"}},
    "uniform": "uniform",
    "influence": "influence",
    "greedy": {"greedy": {"of": "absolute"}},
    "measured": "sensitivity",
}


@pytest.mark.parametrize("name", SPENDING)
@pytest.mark.parametrize(
    "budget", [{"kv_cache": 0.75}, {"parameters": 0.8}], ids=["kv", "parameters"]
)
def test_a_budget_over_steps_leaves_a_stock_checkpoint(name: str, budget: dict[str, float]) -> None:
    select = SPENDING[name]
    made = outcome(dense(), asked(mlp(select), vo(select), qk(select), budget=budget))
    report = made.report
    assert report["model"]["stock"], report["model"]["why_not_stock"]
    config = made.model.config
    fills = config.num_attention_heads * config.head_dim == config.hidden_size
    assert config.model_type == ("llama" if fills else "mistral")
    widths = [report["widths"][f"{kind}.{n}"] for kind in ("vo", "qk") for n in range(2)]
    assert len(set(widths)) == 1 and report["widths"]["mlp.0"] == report["widths"]["mlp.1"]
    ((resource, share),) = budget.items()
    spent = (
        report["kv_bytes_per_token"]
        if resource == "kv_cache"
        else {k: v["total"] for k, v in report["parameters"].items()}
    )
    assert spent["sliced"] <= share * spent["dense"]
    if resource == "kv_cache":
        assert widths[0] == 6
        assert (
            name in ("uniform", "influence") or report["widths"]["mlp.0"] == 64
        )  # it saves nothing


def test_without_it_the_same_budget_leaves_none() -> None:
    steps = mlp(), vo(), qk(per="head")
    sliced = slice_model(dense(), plan(asked(*steps, stock=False), dense().config), tokens())
    assert plan(asked(*steps, stock=False), dense().config).why_not_stock(sliced.widths) is not None


def test_the_energies_of_both_head_spaces_decide_on_their_one_width() -> None:
    def width(loud: str) -> int:
        """Of heads, where the queries and keys, or the values and outputs, carry all that there is to lose."""
        chart = plan(asked(vo(), qk(), mlp(), budget={"parameters": 0.9}), dense().config)
        spectra = {
            u.space.name: torch.full(
                (u.space.copies, u.space.dim), 1e3 if u.space.kind in loud else 1e-9
            )
            for u in chart.units
        }
        widths = chart.allocate(spectra)
        assert widths is not None and widths["vo.0"] == widths["qk.1"]
        return widths["vo.0"]

    assert width("vo") == width("qk") == 8 and width("mlp") < 8


def test_widths_that_a_config_refuses_are_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    def widths() -> set[int]:
        chart = plan(asked(mlp()), dense().config)
        found = chart.allocate({u.space.name: torch.ones(1, 64) for u in chart.units})
        assert found is not None
        return {found[f"mlp.{n}"] for n in range(2)}

    assert widths() == {40}  # the control: multiples of 4

    def picky(layout: Any, widths: Any, config: Any, chosen: bool) -> str | None:
        return "its MLPs must be multiples of 16" if layout.width("mlp.0", widths) % 16 else None

    monkeypatch.setattr(planning, "config_obstacle", picky)
    assert widths() == {32}


REFUSED: dict[str, tuple[tuple[dict[str, Any], ...], dict[str, Any], str]] = {
    "values alone": (
        (vo(),),
        {"budget": {"parameters": 0.95}},
        r"with `stock: true`, space 'vo.0' .*: value heads have 7",
    ),
    "pairs of each head": ((vo(), qk(per="head")), {}, r"different frequency pairs"),
    "shortcuts": (
        (step("residual", "pca", {"uniform": {"width": 24}}) | {"segments": "block"},),
        {"budget": None},
        r"two bases of the residual stream meet",
    ),
    "biases": ((mlp() | {"slice": "bias_compensation"},), {}, r"made up for by biases"),
    "factors": (
        (step("edge", "weight_svd", "uniform"),),
        {},
        r"matrices are stored as two factors",
    ),
    "two selectors": (
        (vo({"uniform": {"width": 4}}), qk({"uniform": {"width": 6}})),
        {"budget": None},
        r"'vo\.0' and 'qk\.0' get one width, .* two selectors would choose it",
    ),
    "two units": (
        (vo(PROGRAMME | {}), step("qk", {"rope_pairs": {"per": "model"}}, PROGRAMME)),
        {},
        r"energies of '?\w+'? .*in",
    ),
    "two shares": (
        (vo("global_energy"), step("qk", {"rope_pairs": {"per": "model"}}, "global_energy")),
        {},
        r"so their energies are added, and those of 'rope_pairs' are in units of 'rope_pairs', those of 'head_svd' in nats",
    ),
    "no width of both": (
        (vo(min=5, max=7), qk(max=4)),
        {},
        r"no width is allowed by the `widths` of both",
    ),
    "half a block": (
        ({"spaces": "mlp", "select": {"shortgpt": {"blocks": 1}}, "widths": {"min": 0}},),
        {"budget": None},
        r"has lost its mlp and not all else",
    ),
    "some protected": ((mlp(protect={"first": 1}),), {}, r"`protect` keeps 'mlp\.0' whole"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_stock_checkpoint_holds_is_refused_before_calibration(name: str) -> None:
    steps, keys, why = REFUSED[name]
    found = {"stock": True, "budget": {"parameters": 0.8}} | keys
    with pytest.raises(InputError) as e:
        plan(recipe(*steps, **{k: v for k, v in found.items() if v is not None}), dense().config)
    assert re.search(why, str(e.value)), str(e.value)
    if "stock" in str(e.value) and "one width" not in str(e.value):
        plan(
            recipe(*steps, **{k: v for k, v in found.items() if v is not None and k != "stock"}),
            dense().config,
        )


def test_a_width_in_both_steps_is_no_budget_and_stays_allowed() -> None:
    fixed = {"uniform": {"width": 4}}
    made = outcome(dense(), recipe(vo(fixed), qk(fixed), stock=True))
    assert made.report["model"]["stock"] and made.model.config.head_dim == 4


def test_blocks_that_go_leave_a_stock_checkpoint_of_those_that_stay() -> None:
    model = dense(num_hidden_layers=4)
    steps = step("[heads, mlp]", "identity", {"shortgpt": {"blocks": 1}}, min=0) | {
        "spaces": ["heads", "mlp"]
    }
    made = outcome(model, recipe(steps, vo(), qk(), stock=True, budget={"parameters": 0.7}))
    assert made.report["model"]["stock"] and made.model.config.num_hidden_layers == 3


OTHERS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], str]] = {
    "OPT's KV groups": (
        "opt",
        {},
        [step("heads", "permute", {"uniform": {"width": 1}}, "least_squares")],
        "do not make up",
    ),
    "OPT's heads": (
        "opt",
        {},
        [step(kind, "identity", {"uniform": {"width": 6}}) for kind in ("vo", "qk")],
        "do not make up its stream of 32",
    ),
    "Phi's pairs": (
        "phi",
        {},
        [step(kind, "identity", {"uniform": {"width": 6}}) for kind in ("vo", "qk")],
        "longrope",
    ),
    "frequencies that change": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        [step(kind, "identity", {"uniform": {"width": 6}}) for kind in ("vo", "qk")],
        "'dynamic' change with the length",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_families_refuse_what_their_configs_do_not_hold(name: str) -> None:
    family, options, steps, why = OTHERS[name]
    model = model_of(family, **options)
    with pytest.raises(InputError, match=re.escape(why)):
        plan(recipe(*steps, stock=True), model.config)
    chart = plan(
        recipe(*steps), model.config
    )  # the control: allowed, told as no stock one, and none
    widths = chart.allocate(None)
    assert widths is not None and why in (chart.why_not_stock(widths) or "")
    assert not outcome(model, recipe(*steps)).report["model"]["stock"]


def test_what_only_the_export_sees_is_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    running = sys.modules[outcome.__module__]
    monkeypatch.setattr(running, "stock", lambda *_: (None, "somebody says so"))
    with pytest.raises(InputError, match=r"stock checkpoint holds this model: somebody says so"):
        outcome(dense(), recipe(mlp("uniform"), stock=True, budget={"parameters": 0.9}))


def test_a_conflict_with_protect_is_told_before_blocks_go() -> None:
    deep = dense(num_hidden_layers=4)
    go = {"spaces": ["heads", "mlp"], "select": {"shortgpt": {"blocks": 1}}, "widths": {"min": 0}}
    with pytest.raises(InputError, match=r"`protect` keeps 'mlp\.0' whole"):
        plan(asked(go, mlp("uniform", protect={"first": 1})), deep.config)
    plan(asked(go, mlp("uniform", protect={"first": 1}), stock=False), deep.config)  # the control


def test_of_a_family_members_are_stock() -> None:
    made = outcome(dense(), asked(mlp("uniform") | {"slice": "truncate"}, nested=[0.7]))
    assert [m["why_not_stock"] for m in made.report["nested"]] == [None, None]
