"""The file that says where a checkpoint's stream lies in the dense model's, and which files belong to a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from folders import invoke, model_of, save_tokens, tokenizer
from transformers import AutoModelForCausalLM

from invariance.core.errors import InputError
from invariance.core.files import beside
from invariance.io.basis_file import NAME, read_basis
from invariance.model.canonical import canonicalize
from invariance.model.copies import copy_in
from invariance.recover.module import hidden_loss
from invariance.recover.teacher import Teacher, tapped

RECIPE = """\
model: {model}
calibrate: {{data: tokens.npy, dtype: float32}}
steps:
  - {{spaces: [mlp, heads], widths: {{min: 0}}, select: {{shortgpt: {{blocks: 1}}}}}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))
    save_tokens(tmp_path / "tokens.npy")
    yield tmp_path


@pytest.mark.parametrize("idle", [0, 1, 3])
def test_the_states_of_a_model_without_an_idle_block_are_those_of_the_dense_one(
    idle: int, folder: Path
) -> None:
    dense = model_of("llama", num_hidden_layers=4)
    for name, p in dense.named_parameters():  # one block writes nothing, so its loss is none
        if f"layers.{idle}." in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            p.data.zero_()
    dense.save_pretrained(folder / "dense")
    tokenizer().save_pretrained(folder / "dense")
    (folder / "recipe.yaml").write_text(RECIPE.format(model=folder / "dense"))
    status, _, err = invoke("run", "recipe.yaml", "--output", "out")
    assert status == 0, err
    student = copy_in(torch.float32, AutoModelForCausalLM.from_pretrained("out/model"))
    layout = canonicalize(student, fold=False)
    ids = torch.randint(1, 41, (2, 12), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids, dtype=torch.bool)
    tutor = Teacher.of(dense, read_basis("out/model", layout))
    tutor.check(student, layout)
    with torch.no_grad(), tapped(student, layout) as found:
        student(ids)
    goal = tutor.streams(ids, None)
    assert len(goal) == 3 and hidden_loss(found, goal, real) < 1e-10
    wrong = {
        point: goal[other] for point, other in zip(goal, [*goal][1:] + [*goal][:1], strict=True)
    }
    assert (
        hidden_loss(found, wrong, real) > 1e-3
    )  # the control: points of other blocks are far away
    (folder / "out" / NAME).unlink()
    with pytest.raises(InputError, match="says which blocks are left"):
        Teacher.of(dense, read_basis("out/model", layout)).check(student, layout)


def test_a_teacher_of_another_family_is_refused() -> None:
    student = copy_in(torch.float32, model_of("llama"))
    layout = canonicalize(student, fold=False)
    tutor = Teacher.of(model_of("opt"), read_basis("nowhere", layout))
    with pytest.raises(InputError, match="of another family"):
        tutor.check(student, layout)


def test_files_above_a_checkpoint_belong_to_it_where_a_run_has_put_them_alone(folder: Path) -> None:
    for name in ("run/model", "run/plain", "own"):
        (folder / name).mkdir(parents=True)
    for name in ("run/report.json", "own/report.json", "report.json"):
        (folder / name).write_text("{}")
    assert beside("run/model", "report.json") == folder / "run/report.json"
    assert beside("own", "report.json") == folder / "own/report.json"
    for other in ("run/plain", "packaged:smollm2-135m-instruct", "model", "owner/model"):
        assert beside(other, "report.json") is None, other
