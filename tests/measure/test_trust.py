"""Task files of one's own run nothing unasked, and their templates never reach Python."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from folders import invoke, save_model, save_tokens, tokenizer

from invariance.core.errors import InputError
from invariance.measure import tasks
from invariance.measure.trust import trusting
from invariance.recipe.evaluate import Tasks

pytest.importorskip("lm_eval", reason="tasks need the extra eval")
TASK = """\
task: t
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: TEXT
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ATTACKS = (
    "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ lipsum.__globals__['os'].system('touch owned') }}",
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))
    row = '{"country": "France", "choices": ["The", "of"], "answer": 0}\n'
    (tmp_path / "rows.jsonl").write_text(row)
    yield tmp_path


def test_functions_of_a_task_file_are_not_run_unasked(place: Path) -> None:
    (place / "evil.py").write_text("open('owned', 'w')\ndef text(doc):\n    return 'The'\n")
    (place / "t.yaml").write_text(TASK.replace("TEXT", "!function evil.text"))
    save_model(place / "model")
    save_tokens(place / "tokens.npy")
    (place / "r.yaml").write_text(
        "model: model\nsteps: [{spaces: mlp, rotate: identity}]\nevaluate: [{tasks: {names: t.yaml}}]\n"
    )
    for flags in (("evaluate", "model", "--task", "t.yaml"), ("run", "r.yaml", "--output", "o")):
        status, out, err = invoke(*flags)
        assert (status, out) == (2, "") and "--trust-task-code" in " ".join(err.split())
    assert not (place / "owned").exists()
    with trusting():
        assert tasks.load(Tasks(names=("t.yaml",)), "here")
    assert (place / "owned").exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_templates_are_rendered_in_a_sandbox(place: Path, attack: str) -> None:
    import lm_eval.utils

    from invariance.measure.trust import sandboxed

    (place / "t.yaml").write_text(TASK.replace("TEXT", f'"{attack}"'))
    before = lm_eval.utils.env
    with trusting(), pytest.raises(InputError, match=r"unsafe|cannot be read"):
        tasks.load(Tasks(names=("t.yaml",)), "here")
        with sandboxed():
            lm_eval.utils.apply_template(attack, {})
    with sandboxed(), pytest.raises(Exception, match=r"unsafe|undefined"):
        lm_eval.utils.apply_template(attack, {})
    assert not (place / "owned").exists() and lm_eval.utils.env is before


def test_templates_of_honest_tasks_are_rendered(place: Path) -> None:
    import lm_eval.utils

    from invariance.measure.trust import sandboxed

    with sandboxed():
        made = lm_eval.utils.apply_template(
            "{{country|regex_replace('a', 'o')}} {{choices[0].upper()}}",
            {"country": "Gabon", "choices": ["x"]},
        )
    assert made == "Gobon X" and tokenizer() is not None
