"""Folders that commands write: what is there stays until the new one stands, and nothing but ours is ever replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from invariance.core import files, manifest, outputs
from invariance.core.errors import InputError, InvarianceError
from invariance.core.files import replacing
from invariance.core.growing import Growing
from invariance.core.outputs import claimed
from invariance.core.signed import check_page, write_page


def make(folder: Path, text: str = "one", overwrite: bool = False) -> None:
    """An output of ours."""
    with claimed(folder, overwrite=overwrite) as claim, claim.writing() as made:
        (made / "model").mkdir()
        (made / "model" / "config.json").write_text(text)
        (made / "report.json").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {
        name: path.read_text(errors="replace")
        for name, path in manifest.entries(folder)
        if path.is_file()
    }


@pytest.fixture(params=["exchanged", "renamed twice"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "renamed twice":
        monkeypatch.setattr(files, "exchange", lambda a, b: False)


def test_an_output_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    make(tmp_path / "deep" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert manifest.not_ours(tmp_path / "deep" / "out") is None


def test_an_earlier_output_is_replaced_only_if_asked(tmp_path: Path, both_ways: None) -> None:
    make(tmp_path / "out")
    with pytest.raises(InputError, match=r"not empty.*--overwrite"):
        make(tmp_path / "out", "two")
    make(tmp_path / "out", "two", overwrite=True)
    assert contents(tmp_path / "out")["report.json"] == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["old", "new", "lock", "x" * 255, "ü" * 127, ".hidden", "a b'\""])
def test_any_name_that_the_system_takes_will_do(name: str, tmp_path: Path, both_ways: None) -> None:
    make(tmp_path / name)
    make(tmp_path / name, "two", overwrite=True)
    assert contents(tmp_path / name)["report.json"] == "two"
    assert [p.name for p in tmp_path.iterdir()] == [name]


def spoilt(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def prepare(root: Path) -> Path:
        make(root / "out")
        change(root / "out")
        return root / "out"

    return prepare


def linked(root: Path) -> Path:
    make(root / "real")
    (root / "link").symlink_to(root / "real")
    return root / "link"


def with_only(name: str) -> Callable[[Path], Path]:
    def prepare(root: Path) -> Path:
        (root / "out").mkdir()
        (root / "out" / name).write_text("{}")
        return root / "out"

    return prepare


def a_file(root: Path) -> Path:
    (root / "file").write_text("mine")
    return root / "file"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a file of somebody's": (spoilt(lambda o: (o / "sales.xlsx").write_text("1")), "sales.xlsx"),
    "a file of somebody's, deep": (
        spoilt(lambda o: (o / "model" / "my").write_text("1")),
        "model/my",
    ),
    "a file that was edited": (
        spoilt(lambda o: (o / "report.json").write_text("2")),
        "report.json.*changed",
    ),
    "a folder of somebody's": (spoilt(lambda o: (o / "mine").mkdir()), "'mine'"),
    "a link": (spoilt(lambda o: (o / "data").symlink_to("/tmp")), "'data', which lies elsewhere"),
    "a link for a file": (
        spoilt(
            lambda o: ((o / "report.json").unlink(), (o / "report.json").symlink_to("/etc/hosts"))
        ),
        "report.json",
    ),
    "a manifest that is damaged": (
        spoilt(lambda o: (o / manifest.NAME).write_text("{")),
        "manifest",
    ),
    "no manifest": (with_only("report.json"), "report.json"),
    "a link to an output": (linked, "symbolic link to"),
    "a file in its place": (a_file, "a file is there"),
    "below a file": (lambda root: a_file(root) / "out", "is a file"),
    "a name too long": (lambda root: root / ("x" * 256), "too long"),
    "a path too long": (lambda root: root.joinpath(*["x" * 250] * 17), "too long"),
    "a name that is no text": (lambda root: root / "a\udcff", "no text"),
    "a mount point": (lambda root: Path("/dev"), "mounted"),
    "the root": (lambda root: Path("/"), "mounted"),
    "where nobody writes": (lambda root: Path("/proc/mine"), "cannot be written"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_ours_is_refused_by_name_and_stays(case: str, tmp_path: Path) -> None:
    prepare, says = REFUSED[case]
    output = prepare(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"(?s){says}"), claimed(output, overwrite=True):
        raise AssertionError("work began")
    assert contents(tmp_path) == before


def test_where_the_command_runs_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for output in (Path("."), Path("..")):
        with pytest.raises(InputError, match="where the command runs"), claimed(output):
            pass


@pytest.mark.parametrize("output", ["run", "run/model"])
def test_what_is_read_is_not_replaced(output: str, tmp_path: Path) -> None:
    make(tmp_path / "run")
    make(tmp_path / "run2")
    (tmp_path / "link").symlink_to(tmp_path / "run" / "model")
    for read in (tmp_path / "run" / "model", tmp_path / "link"):
        with (
            pytest.raises(InputError, match=r"which is read|no manifest"),
            claimed(tmp_path / output, overwrite=True, reads=["owner/name", read]),
        ):
            pass


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    with claimed(tmp_path / "out"), pytest.raises(InputError, match="another process"):
        make(tmp_path / "out")
    make(tmp_path / "out")


def elsewhere(code: str) -> subprocess.Popen[str]:
    """Another process, that has printed a line."""
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    return started


def test_a_writer_in_another_process_is_noticed_and_one_that_was_killed_is_cleared(
    tmp_path: Path,
) -> None:
    code = (
        "import time\nfrom pathlib import Path\nfrom invariance.core.outputs import claimed\n"
        f"with claimed(Path({str(tmp_path / 'out')!r})) as c, c.writing() as made:\n"
        "    (made / 'half').write_text('x')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    other = elsewhere(code)
    with pytest.raises(InputError, match="another process"):
        make(tmp_path / "out")
    other.kill()
    other.wait()
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1
    make(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_that_a_killed_process_had_moved_aside_comes_back(tmp_path: Path) -> None:
    make(tmp_path / "out")
    place = outputs.Claim(tmp_path / "out", "--output", True).place
    place.mkdir()
    os.replace(tmp_path / "out", place / files.OLD)
    (place / files.NEW).mkdir()
    with pytest.raises(InputError, match="not empty"):
        make(tmp_path / "out", "two")
    assert contents(tmp_path / "out")["report.json"] == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_in_the_way_that_we_did_not_make_stays(tmp_path: Path) -> None:
    place = outputs.Claim(tmp_path / "out", "--output", True).place
    place.mkdir()
    (place / "mine").write_text("precious")
    with pytest.raises(InputError, match="in the way"):
        make(tmp_path / "out")
    assert (place / "mine").read_text() == "precious"


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError("disk full"), InputError("no")])
def test_what_fails_under_way_leaves_the_old_output(
    fault: BaseException | type[BaseException], tmp_path: Path
) -> None:
    make(tmp_path / "out")
    with (
        pytest.raises(BaseException),  # noqa: B017 - whatever it is
        claimed(tmp_path / "out", overwrite=True) as claim,
        claim.writing() as made,
    ):
        (made / "half").write_text("x")
        raise fault
    assert contents(tmp_path / "out")["report.json"] == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_between_two_renames_waits_for_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def interrupted(source: Path, target: Path) -> None:
        real(source, target)
        os.kill(os.getpid(), signal.SIGINT)

    make(tmp_path / "out")
    monkeypatch.setattr(files, "exchange", lambda a, b: False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (
            pytest.raises(KeyboardInterrupt),
            claimed(tmp_path / "out", overwrite=True) as claim,
            claim.writing() as made,
        ):
            (made / "report.json").write_text("two")
            monkeypatch.setattr(os, "replace", interrupted)
    finally:
        signal.signal(signal.SIGINT, before)
    assert contents(tmp_path / "out")["report.json"] == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_files_that_came_meanwhile_stay_and_the_work_is_not_lost(tmp_path: Path) -> None:
    with (
        pytest.raises(InvarianceError, match=r"the result is in .*out-2") as raised,
        claimed(tmp_path / "out") as claim,
        claim.writing() as made,
    ):
        (made / "report.json").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("precious")
    assert raised.value.exit_status == 1
    assert contents(tmp_path / "out") == {"mine": "precious"}
    assert contents(tmp_path / "out-2")["report.json"] == "new"


def test_too_little_room_is_said_in_gigabytes(tmp_path: Path) -> None:
    outputs.check_room(tmp_path / "not" / "there", 1)
    with pytest.raises(InputError, match=r"1000000.00 GB will be written"):
        outputs.check_room(tmp_path, 10**15)


def test_a_second_rename_that_fails_brings_the_first_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out")
    real, calls = os.replace, list[object]()

    def replace(a: Path, b: Path) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise OSError("no")
        real(a, b)

    monkeypatch.setattr(files, "exchange", lambda a, b: False)
    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="no"):
        make(tmp_path / "out", "two", overwrite=True)
    assert contents(tmp_path / "out")["report.json"] == "one"


def test_what_a_killed_process_left_of_a_file_is_cleared_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    code = (
        "import time\nfrom pathlib import Path\nfrom invariance.core.files import replacing\n"
        f"with replacing(Path({str(path)!r})) as made:\n"
        "    made.write_text('half')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    other = elsewhere(code)
    with replacing(path) as made:  # beside a process that lives: both may
        made.write_text("whole")
    assert len(list(tmp_path.iterdir())) == 2
    other.kill()
    other.wait()
    with replacing(path) as made:
        made.write_text("again")
    assert contents(tmp_path) == {"results.csv": "again"}


def test_a_folder_that_grows_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    study = Growing(tmp_path / "study", ("study.yaml", "results.csv"))
    study.begin()
    for text in ("one", "two"):
        with study.filling() as made:
            (made / "results.csv").write_text(text)
        study.begin()
    (study.folder / "notes.txt").write_text("mine")
    study.check()
    (study.folder / "results.csv").write_text("edited")
    with pytest.raises(InputError, match=r"results\.csv.* not as we wrote it"):
        study.check()
    assert contents(study.folder)["notes.txt"] == "mine"


def test_a_folder_with_a_yaml_of_somebodys_does_not_become_a_study(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"study\.yaml"):
        Growing(tmp_path, ("study.yaml",)).begin()
    assert contents(tmp_path) == {"study.yaml": "mine"}


def test_a_file_between_two_states_is_ours_in_both(tmp_path: Path) -> None:
    """As after kill -9 behind the note, in front of the rename."""
    study = Growing(tmp_path / "study", ("results.csv",))
    study.begin()
    with study.filling() as made:
        (made / "results.csv").write_text("one")
    known = manifest.read(study.folder)
    assert known is not None
    study._note({"results.csv": (*known.files["results.csv"], "f" * 64)})
    study.check()


def test_a_page_is_written_again_only_if_it_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "both.html"
    for text in ("<p>one", "<p>two"):
        write_page(path, text, "--html")
    assert path.read_text().startswith("<p>two")
    path.write_text(path.read_text().replace("two", "three"))
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "report.json")
    for other in (path, tmp_path / "report.json", tmp_path / "link", tmp_path):
        with pytest.raises(InputError, match="--html"):
            check_page(other, "--html")
    assert (tmp_path / "report.json").read_text() == "{}"
