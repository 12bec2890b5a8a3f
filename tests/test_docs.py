"""The docs say what is so: their code runs, their commands parse, their recipes and links exist."""

from __future__ import annotations

import ast
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import typer
from folders import types_forgotten
from typer.testing import CliRunner

from invariance.cli import commands as cli
from invariance.method import interfaces, manual
from invariance.method.interfaces import ENTRY_POINTS
from invariance.recipe.budget import Budget
from invariance.recipe.calibrate import Calibrate
from invariance.recipe.evaluate import Divergence, Perplexity, Samples, Tasks
from invariance.recipe.recipe import Recipe, parse_recipe
from invariance.recipe.recover import Local, Lora, Loss, Recover, Text
from invariance.recipe.step import Step

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, and the line that it starts on."""

    page: str
    language: str
    text: str
    line: int


TOLD = "docs/tutorial-method.md"  # which is run as a whole (test_tutorial.py)


def blocks(*languages: str, told: bool = False) -> list[Block]:
    fence = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(str(page.relative_to(ROOT)), m[1], m[2], text.count("\n", 0, m.start()) + 2)
        for page in PAGES
        if (page == ROOT / TOLD) is told
        for text in [page.read_text()]
        for m in fence.finditer(text)
        if m[1] in languages
    ]


def where(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """An empty working folder and cache; what is registered inside is forgotten afterwards."""
    interfaces.registry("rotate")  # entry points first
    monkeypatch.setattr(
        interfaces, "_REGISTRY", {k: dict(v) for k, v in interfaces._REGISTRY.items()}
    )
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with types_forgotten():
        yield tmp_path / "work"


@pytest.mark.parametrize("page", sorted({b.page for b in blocks("python")}))
def test_python_of_a_page_runs_from_top_to_bottom(page, sandbox, monkeypatch):
    module = ModuleType("page_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks("python"):
        if block.page == page:
            source = (
                "\n" * (block.line - 1) + block.text
            )  # so that a traceback has the page's lines
            exec(compile(source, ROOT / page, "exec"), vars(module))


def commands(told: bool = False) -> list[tuple[Block, list[str]]]:
    """Every command line of a bash block, without comments and variables before it."""
    return [
        (block, words)
        for block in blocks("bash", "sh", "console", told=told)
        for line in block.text.replace("\\\n", " ").splitlines()
        if (words := shlex.split(line, comments=True))
    ]


@pytest.mark.parametrize(
    "block, words", commands(), ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_a_command_parses_and_what_it_names_exists(block, words):
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets), where(block)
        return
    if program == "python":
        script = (ROOT / arguments[0]).read_text()
        assert all(f'"{word}"' in script for word in arguments if word.startswith("--")), where(
            block
        )
        assert all((ROOT / word).exists() for word in arguments if word.endswith(".yaml")), where(
            block
        )
        return
    assert program == "invariance", f"{where(block)}: nothing checks {program}"
    group = typer.main.get_command(cli.app)
    context = group.make_context("invariance", list(arguments))
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    parsed = command.make_context(name, rest, parent=context)
    recipe = parsed.params.get("recipe")
    if recipe is not None and recipe.parts[0] == "recipes":
        text = (ROOT / recipe).read_text()
        parse_recipe(text, str(recipe), parsed.params["set_"])


def whole_recipes() -> list[Block]:
    return [
        b
        for b in blocks("yaml")
        if re.search(r"^model:", b.text, re.M) and re.search(r"^steps:", b.text, re.M)
    ]


@pytest.mark.parametrize("block", whole_recipes(), ids=where)
def test_a_recipe_parses(block, sandbox):
    plug_in(sandbox)
    parse_recipe(block.text, where(block))


def plug_in(folder: Path) -> Path:
    """The methods of docs/add-a-method.md, in the file that it speaks of, and loaded."""
    code = [b.text for b in blocks("python") if b.page == "docs/add-a-method.md"]
    file = folder / "my_methods.py"
    file.write_text("\n\n".join(code[:4]))
    interfaces.load_plugin(str(file))
    return file


def test_the_plugin_that_the_docs_build_is_found_by_name(sandbox):
    shown = CliRunner().invoke(
        cli.app, ["methods", "ends_whole", "--plugin", str(plug_in(sandbox))]
    )
    assert shown.exit_code == 0 and "keep: " in shown.output, shown.output


def test_the_entry_point_of_the_docs_is_the_one_that_is_read():
    (block,) = blocks("toml")
    assert list(tomllib.loads(block.text)["project"]["entry-points"]) == [ENTRY_POINTS]


def test_the_methods_page_is_what_the_docstrings_make():
    assert (ROOT / "docs/methods.md").read_text() == manual.markdown(), (
        "run `python -m invariance.method.manual > docs/methods.md`"
    )


@pytest.mark.parametrize(
    "part",
    [Recipe, Step, Calibrate, Perplexity, Divergence, Tasks, Samples, Budget],
    ids=lambda p: p.__name__,
)
def test_every_key_of_a_recipe_is_explained(part):
    text = (ROOT / "docs/recipes.md").read_text()
    missing = [
        key for key in part.model_fields if f"`{key}`" not in text and f"`{{{key}: " not in text
    ]
    assert not missing


def test_every_key_of_recovery_is_explained():
    text = (ROOT / "docs/recover.md").read_text()
    parts = (Recover, Lora, Loss, Text, Local)
    assert not [key for part in parts for key in part.model_fields if f"`{key}`" not in text]


def test_every_key_of_a_report_is_explained():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/reports.md").read_text(), re.MULTILINE)
    explained = {word.split(".")[0] for row in rows for word in re.findall(r"`(\w[\w.{},]*)`", row)}
    source = (ROOT / "invariance/run/document.py").read_text()
    body = source[source.index("def document(") : source.index("def measured(")]
    made = set(re.findall(r'^ {8}"(\w+)":', body, re.MULTILINE))
    assert "exactness" in made and made <= explained


@pytest.mark.parametrize("name", NAMES)
def test_every_link_of_a_page_leads_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{name}: {target}"


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", [*NAMES, "docs/idea.svg"])
def test_no_page_speaks_of_one_machine(name):
    text = (ROOT / name).read_text()
    assert not re.findall(
        r"(?<![\w.~])/(?:home|work|root|tmp|Users|opt|mnt|data)/\S*|[A-Z]:\\\S*|localhost\S*", text
    )


def test_every_page_of_the_docs_is_in_the_index():
    index = (ROOT / "docs/index.md").read_text()
    shown = {page.name for page in ROOT.glob("docs/*.md")} - {"index.md"}
    assert all(f"({name})" in index for name in shown)


# --- The style that CONTRIBUTING.md asks for.

LONGEST, LONG, MOST = 350, 60, 7  # lines of a file, lines of a function, parameters of a function
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources(*folders: str) -> dict[str, str]:
    """Path → text of the modules in some folders."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return {str(file.relative_to(ROOT)): file.read_text() for file in files}


def parameters(source: str) -> dict[str, int]:
    """Function → how many parameters it takes, beside ``self`` and ``cls``."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS):
            a = node.args
            names = [
                p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if p
            ]
            found[node.name] = max(found.get(node.name, 0), len({*names} - {"self", "cls"}))
    return found


def lines(source: str, options: bool = True) -> dict[str, int]:
    """Function → how many lines it has, those inside it and its docstring included; without its parameters if not
    ``options``."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS):
            first = node if options else node.body[0]
            count = node.end_lineno - first.lineno + 1
            found[node.name] = max(found.get(node.name, 0), count)
    return found


def test_no_file_is_too_long_to_be_read_at_once():
    lengths = {name: text.count("\n") for name, text in sources("invariance", "methods").items()}
    assert not {name: n for name, n in lengths.items() if n > LONGEST}


def test_no_function_is_too_long_to_be_read_at_once():
    """Options of commands take many lines and say little of how long the command is."""
    read = sources("invariance", "methods")
    counted = {name: lines(text, options="/cli/" not in name) for name, text in read.items()}
    assert not {(n, f): c for n, each in counted.items() for f, c in each.items() if c > LONG}
    text = "def f(\n  a,\n):\n  1\n  def g():\n    pass\n"
    assert lines(text) == {"f": 6, "g": 2} and lines(text, options=False) == {"f": 3, "g": 1}


def test_more_than_seven_parameters_want_a_type():
    """Options of commands are parameters of theirs, and as many as there are."""
    read = {n: s for n, s in sources("invariance", "methods").items() if "/cli/" not in n}
    wide = {(n, f) for n, s in read.items() for f, count in parameters(s).items() if count > MOST}
    assert not wide
    assert parameters("def f(self, a, *b, c=1, **d): ...") == {"f": 4}
