"""Refits that follow the dense stream: what they bring nearer, what they leave alone, and what the walk carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import save_tokens
from sliced import HEADS, MLP, RAW, close, dense, exact, real, recipe, sliced, tokens
from sliced import data as data
from torch import Tensor, nn

from invariance.calibrate import walk
from invariance.calibrate.beside import Following
from invariance.calibrate.enter import enter
from invariance.calibrate.moments import Moments
from invariance.compress import calibration
from invariance.compress.pipeline import slice_model
from invariance.compress.planner import plan
from invariance.core.change import Change
from invariance.core.errors import InputError
from invariance.io.data import Tokens
from invariance.model.families import architecture
from invariance.model.verify import logits, relative_error
from invariance.model.working import Whole
from invariance.run.compress import compress


def stream(model: nn.Module, ids: Tensor) -> Tensor:
    """What arrives before the final norm, where no basis of it has changed."""
    found: list[Tensor] = []
    inner = getattr(model, "inner", model)
    norm = inner.get_submodule(architecture(inner.config).final_norm)
    handle = norm.register_forward_pre_hook(lambda _m, a: found.append(a[0].detach().double()))
    logits(model, ids)  # type: ignore[arg-type]
    handle.remove()
    return found[0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("held_out", [False, True])
def test_refitting_to_the_dense_stream_brings_the_sliced_one_nearer(
    held_out: bool, family: str
) -> None:
    ids = torch.from_numpy(np.load(save_tokens(Path("more.npy"), 16, seed=9)))
    ids = ids if held_out else tokens().ids
    goal = stream(dense(family), ids)
    errors = {
        order: relative_error(
            goal, stream(compress(dense(family), recipe(MLP, HEADS, order=order)), ids)
        )
        for order in ("sequential", "dense_target")
    }
    assert errors["dense_target"] < errors["sequential"]


@pytest.mark.parametrize("family", ["llama", "opt", "phi", "gemma3_text"])
def test_the_stream_that_is_carried_is_the_refit_models_own(family: str) -> None:
    """The walk multiplies what the writers read once, before the cut; the cut model must compute the same."""
    model, layout = exact(family)
    basis = {n: layout.spaces[n].element(seed=3) for n in layout.spaces}

    def decide(name: str, _: Moments) -> Change | None:
        whole = Change.rotation(basis[name])
        kind, k = layout.spaces[name].kind, whole.width - 2
        if (
            kind == "heads"
        ):  # of llama's two groups one stays in the first block, none in the second
            k = whole.width - 1 - int(name[-1])
        return whole if kind == "qk" else whole.columns(torch.arange(k))

    ids = tokens().ids
    inner = {n: frozenset({RAW}) for n, s in layout.spaces.items() if s.kind != "residual"}
    parts = Whole(model, layout)
    batches = enter(parts, [real(part) for part in ids.split(8)], torch.float64)
    cutting = walk.Cutting(inner, decide)
    walk.sequential(parts, batches, torch.float64, cutting, follow=Following())
    carried = torch.cat([b.x for b in batches])
    assert close(stream(model, ids), carried, bound=1e-9)
    assert not close(stream(exact(family)[0], ids), carried, bound=1e-2)


def test_the_held_out_part_does_not_depend_on_the_batch_size() -> None:
    weights = []
    for batch in (2, 16, 32):
        asked = recipe(MLP, order="dense_target", calibrate={"batch": batch})
        weights.append(sliced(asked).model.get_submodule("model.layers.1.stages.1.mlp.down").weight)
    assert all(relative_error(weights[0], w) < 1e-3 for w in weights[1:])


def test_following_the_dense_stream_refuses_too_few_sequences_to_hold_one_out() -> None:
    asked = recipe({"spaces": "mlp", "select": {"uniform": {"keep": 0.5}}}, order="dense_target")
    few = Tokens(tokens().ids[:3], tokens().mask[:3])
    with pytest.raises(InputError, match="3 sequences"):
        slice_model(dense(), plan(asked, dense().config), few)


@pytest.mark.parametrize(("family", "part"), [("llama", 0), ("gemma3_text", 0), ("gemma3_text", 1)])
def test_a_dense_stream_that_was_kept_and_one_walked_again_give_one_model(
    family: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part is what a branch gives, where a norm behind it parts that from the stream."""
    asked = recipe(MLP, HEADS, order="dense_target")
    weight = "model.layers.1.stages.1.mlp.down.weight"
    kept = sliced(asked, dense(family)).model.get_parameter(weight)
    real = walk.oneshot

    def disturbed(*args: Any, streams: Any, **options: Any) -> None:
        real(*args, streams=streams, **options)
        for passed in streams:
            behind, given = passed[0]
            other = behind.flip(-1)  # another length a norm would not see
            passed[0] = (
                (other, other if behind is given else given) if part == 0 else (behind, 1.1 * given)
            )

    with monkeypatch.context() as patch:
        patch.setattr(walk, "oneshot", disturbed)  # the control: the streams are what is followed
        disturbed_one = sliced(asked, dense(family)).model.get_parameter(weight)
        assert relative_error(kept, disturbed_one) > 1e-3
    monkeypatch.setattr(calibration.Calibration, "_streams_fit", lambda self, batches: False)
    assert torch.equal(kept, sliced(asked, dense(family)).model.get_parameter(weight))


def test_refitting_readers_too_brings_predictions_nearer() -> None:
    """By what they predict on tokens that were not seen: KL from the dense model, three layers deep."""
    ids = torch.from_numpy(np.load(save_tokens(Path("unseen.npy"), 16, seed=11)))
    model = dense(num_hidden_layers=4)
    goal = logits(model, ids).double().log_softmax(-1)
    loss = {}
    for refit in ("writers", "both"):
        small = compress(model, recipe(MLP, HEADS, order="dense_target", refit=refit))
        loss[refit] = (
            (goal.exp() * (goal - logits(small, ids).double().log_softmax(-1))).sum(-1).mean()
        )
    assert loss["both"] < loss["writers"]


def test_readers_of_an_untouched_stream_stay_as_they_are() -> None:
    """Nothing is cut before block 1, so what is refit there has nothing to make up for."""
    step = {"spaces": "mlp.1", "rotate": "permute", "select": {"uniform": {"width": 40}}}
    found = sliced(recipe(step, order="dense_target")).model
    before = dense().get_parameter("model.layers.1.self_attn.q_proj.weight")
    after = found.get_parameter("model.layers.1.stages.0.attention.q.weight")
    assert relative_error(before, after) < 1e-5


@pytest.mark.parametrize("rotate", ["fluctuation", "obs", "ridge_leverage", "permute"])
def test_every_choice_of_channels_can_follow_the_dense_stream(rotate: str) -> None:
    step = MLP | {"rotate": rotate}
    assert sliced(recipe(step, order="dense_target")).widths["mlp.1"] == 40
