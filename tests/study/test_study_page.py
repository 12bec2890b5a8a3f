"""The page of a study: it loads nothing, says what was found, and works in a real browser, on a phone too."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pages import Page

from invariance.report import figures as files
from invariance.report.document import Report
from invariance.report.energy import energy_lost
from invariance.report.reading import checked
from invariance.study.page import Results, figures, page
from invariance.study.study import Study, load_study
from invariance.study.table import row

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
PHONE = 390  # CSS pixels, the width of many phones
NASTY = "<script>alert('1')</script>"
SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"

PROBE = """<!doctype html><iframe id="f" width="WIDTH" height="800" src="page.html"></iframe><p id="found"></p><script>
const frame = document.getElementById('f');
frame.addEventListener('load', () => {
  const page = frame.contentDocument, root = page.documentElement, names = () =>
    [...page.querySelectorAll('#runs tbody tr')].map(r => r.children[COLUMN].textContent);
  const heading = page.querySelectorAll('#runs thead button')[COLUMN];
  heading.click(); const up = names(); heading.click(); const down = names();
  const point = page.querySelector('svg a'), id = point.getAttribute('xlink:href').slice(1);
  const closed = page.getElementById(id).closest('details').open;
  point.dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true, view: frame.contentWindow}));
  setTimeout(() => {
    document.getElementById('found').textContent = JSON.stringify({
      width: root.scrollWidth, seen: root.clientWidth, up, down, closed, open: page.getElementById(id).closest('details').open,
      loaded: frame.contentWindow.performance.getEntriesByType('resource').length,
      drawn: [...page.querySelectorAll('figure svg')].every(s => s.getBoundingClientRect().height > 20),
    });
  }, 200);
});
</script>"""


SIMPLEST = """<!doctype html><p id="found"></p><script>
document.getElementById('found').textContent = 'ran';
</script>"""


def of_run(width: int, perplexity: float, parameters: int) -> dict[str, Any]:
    dims = {f"mlp.{i}": 64 for i in range(6)}
    return {
        "model": {"name": NASTY, "stock": True},
        "recipe": {"model": NASTY, "steps": "x" * 300},
        "seconds": {"calibrate": 1.0, "fit": 0.5},
        "versions": {"torch": "2"},
        "parameters": {
            s: {"total": n, "embedding": 1, "blocks": n - 1, "shortcuts": 0, "head": 0}
            for s, n in (("dense", 1000), ("sliced", parameters))
        },
        "flops_per_token": {"dense": 9, "sliced": 8},
        "kv_bytes_per_token": {"dense": 9, "sliced": 9},
        "perplexity": {
            "text": {"dense": 10.0, "sliced": perplexity, "recovered": None, "tokens": 9}
        },
        "predicted": {"loss": None, "measured": 0.1},
        "texts": {
            "all": {"sliced": {"geometric_mean": perplexity / 10, "worst": perplexity / 5}},
            "unseen": {"sliced": {"geometric_mean": perplexity / 7, "worst": perplexity / 6}},
        },
        "tokens_per_second": {"dense": None, "sliced": None},
        "exactness": {"relative_error": 1e-15},
        "widths": dict.fromkeys(dims, width),
        "dims": dims,
        "kinds": dict.fromkeys(dims, "mlp"),
    }


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    path = tmp_path_factory.mktemp("study") / "made up.yaml"
    path.write_text(f"""
base: {{model: m, calibrate: {{data: t.npy}}, steps: [{{spaces: mlp, rotate: permute, select: {{uniform: {{keep: 0.5}}}}}}]}}
grid:
  method:
    "{NASTY}": {{steps.0.slice: least_squares}}
    a method with a name that is much longer than any phone is wide, for once: {{steps.0.slice: truncate}}
  steps.0.select.uniform.width: [16, 32, 48]
  seed: [0, 1]
""")
    return load_study(path)


def made(study: Study, worst: float = 1.0) -> Results:
    """Twelve runs, of which one failed; the perplexities of two are ``worst`` times what they should be."""
    rows, reports, spectra = [], {}, {}
    for n, variant in enumerate(study.variants()):
        width = int(str(variant.varied["steps.0.select.uniform.width"]))
        name = f"{n:016x}"
        if n == 5:
            rows.append(row(name, variant.varied, None, "failed", f"no reason {NASTY}"))
            continue
        perplexity = (10 + (64 - width) / 8 + n / 10) * (worst if n in (6, 7) else 1)
        reports[name] = checked(Report, of_run(width, perplexity, 100 + 10 * width), name)
        spectra[name] = {f"mlp.{i}": [2.0 ** -(j / 8) for j in range(64)] for i in range(6)}
        rows.append(row(name, variant.varied, reports[name], "done"))
    return Results(study, rows, reports, spectra)


@pytest.fixture(scope="module")
def found(study: Study) -> Results:
    return made(study)


@pytest.fixture(scope="module")
def drawn(found: Results) -> dict[str, files.Drawing]:
    return {each.name: each for each in figures(found)}


@pytest.fixture(scope="module")
def html(found: Results, drawn: dict[str, files.Drawing]) -> str:
    return page(found, list(drawn.values()))


def words_of(drawing: files.Drawing) -> list[str]:
    return ["".join(t.itertext()) for t in ElementTree.fromstring(drawing.svg).iter(f"{SVG}text")]


def test_figures_lie_in_a_folder_as_svg_and_pdf_that_load_nothing(
    drawn: dict[str, files.Drawing], tmp_path: Path
) -> None:
    assert set(drawn) == {"front", "curves", "widths-mlp", "kept-mlp", "cut-mlp", "spectra-mlp"}
    files.write(tmp_path / "figures", [drawn["front"], drawn["curves"]])
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{n}.{kind}" for n in ("front", "curves") for kind in ("svg", "pdf")}
    for path in (tmp_path / "figures").glob("*.svg"):
        text = path.read_text()
        root = ElementTree.fromstring(text)
        assert root.tag == f"{SVG}svg" and "<script" not in text and "@import" not in text
        assert all(link.startswith("#") for e in root.iter() if (link := e.get(LINK)))
        assert not re.search(r"var\(--|oklch|color-mix", text)
    for path in (tmp_path / "figures").glob("*.pdf"):
        assert path.read_bytes().startswith(b"%PDF") and b"CreationDate" not in path.read_bytes()


def test_figures_name_their_series_axes_and_what_they_show(
    drawn: dict[str, files.Drawing],
) -> None:
    said = words_of(drawn["curves"])
    assert {"Perplexity over width", "perplexity", "width", NASTY} <= set(said)
    assert any(re.fullmatch("a method .*….* for once", t) for t in said)
    assert "Perplexity over parameters" in words_of(drawn["front"])


def test_the_same_study_is_drawn_the_same_to_the_byte(
    found: Results, drawn: dict[str, files.Drawing]
) -> None:
    again = {each.name: each for each in figures(found)}
    assert again["front"].svg == drawn["front"].svg and again["front"].pdf() == drawn["front"].pdf()
    assert drawn["front"].svg != drawn["curves"].svg  # the control


def test_a_study_of_which_nothing_is_done_draws_nothing(found: Results) -> None:
    assert figures(replace(found, rows=[r for r in found.rows if r["status"] != "done"])) == []


def dots(drawing: files.Drawing) -> int:
    """How many marks lead somewhere or say a number."""
    root = ElementTree.fromstring(drawing.svg)
    said = [t.text or "" for t in root.iter(f"{SVG}title")]
    return sum(bool(re.search(r": [\d.]+, [\d.]+$", text)) for text in said)


def test_along_a_column_of_the_results_a_curve_joins_all_widths(
    found: Results, drawn: dict[str, files.Drawing]
) -> None:
    options = found.study.options.model_copy(update={"x": "parameters"})
    along = replace(found, study=replace(found.study, options=options))
    whole = next(d for d in figures(along) if d.name == "curves")
    assert "Perplexity over parameters" in words_of(whole)
    assert dots(whole) == dots(drawn["curves"]) == 2 * 3  # a series each of two methods


def test_each_column_asked_for_has_figures_of_its_own(found: Results) -> None:
    asked = found.study.options.model_copy(update={"y": ("ratio.unseen", "worst.all")})
    several = replace(found, study=replace(found.study, options=asked))
    made = {each.name: each for each in figures(several)}
    assert {"front", "front-worst-all", "curves", "curves-worst-all"} <= made.keys()
    said = words_of(made["curves"])
    assert "Perplexity ratio, texts that calibrated nothing over width" in said
    first = found.done[0]
    assert first["ratio.unseen"] == first["perplexity"] / 7
    assert first["worst.all"] == first["perplexity"] / 5 and "ratio.calibrated" not in first


def test_seeds_make_one_point_with_a_standard_error(
    found: Results, drawn: dict[str, files.Drawing]
) -> None:
    def bars(drawing: files.Drawing) -> int:
        return len(re.findall(r'id="[\w-]*LineCollection_\d+"', drawing.svg))

    # of six points, one has a single run, since the other seed failed
    assert bars(drawn["curves"]) == 5
    one = [r for r in found.rows if r["seed"] == 0]
    assert bars(next(d for d in figures(replace(found, rows=one)) if d.name == "curves")) == 0
    one = [r | {"perplexity_error": 0.5} for r in one]  # over the windows of each
    assert bars(next(d for d in figures(replace(found, rows=one)) if d.name == "curves")) == 6


def test_one_bad_run_flattens_nothing_and_is_said(found: Results, study: Study) -> None:
    def ticks(results: Results) -> list[float]:
        front = next(d for d in figures(results) if d.name == "front")
        said = words_of(front)
        beside = said[said.index("parameters") + 1 : said.index("perplexity")]  # the y axis
        return [float(t) for t in beside]

    bad = made(study, worst=900)
    front = next(d for d in figures(bad) if d.name == "front")
    assert any("not to scale: 2 above" in t for t in words_of(front))
    assert "not to scale" in front.caption
    assert max(ticks(bad)) < 30 and max(ticks(found)) < 30
    assert not any("not to scale" in t for d in figures(found) for t in words_of(d))


def test_the_page_loads_nothing_runs_its_own_script_only_and_escapes_all(html: str) -> None:
    found = Page(html)
    for tag, attributes in found.tags:
        assert tag not in {"img", "link", "iframe", "object", "embed", "image", "use"} or (
            tag == "use" and str(attributes["xlink:href"]).startswith("#")
        )
        assert not {a for a in attributes if a == "src" or a.startswith("on")}
        links = [v for a, v in attributes.items() if a in ("href", "xlink:href")]
        assert all(str(v).startswith("#") for v in links)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert html.count("<script>") == 1 and re.search(r"script-src 'sha256-[\w+/=]{44}'", html)
    assert found.text.count(NASTY) > 5 and "no reason" in found.text


def test_every_point_and_row_leads_to_a_recipe_that_is_there(html: str) -> None:
    tags = Page(html).tags
    rows = {a["href"] for tag, a in tags if tag == "a" and "href" in a}
    points = {a["xlink:href"] for tag, a in tags if tag == "a" and "xlink:href" in a}
    there = {f"#{a['id']}" for tag, a in tags if tag == "pre"}
    assert len(rows) == 11 and rows == points == there


def test_ids_of_drawings_do_not_meet_on_the_page(html: str) -> None:
    ids = [a["id"] for _, a in Page(html).tags if "id" in a]
    assert len(ids) > 50 and len(ids) == len(set(ids))


def test_heat_maps_have_a_row_a_run_and_a_cell_a_layer(drawn: dict[str, files.Drawing]) -> None:
    for name in ("kept-mlp", "cut-mlp"):
        mesh = re.search(r'id="[\w-]*QuadMesh_1">(.*?)</g>', drawn[name].svg, re.DOTALL)
        assert mesh is not None and mesh[1].count("<path") == 11 * 6
        assert {str(n) for n in range(6)} <= set(words_of(drawn[name]))


def found_in(html: str, folder: Path) -> str | None:
    """What a page's script has put into its element `found`, in a browser that shares nothing with the user's own.

    What the browser says on standard error means nothing: wrappers of distributions print warnings of their shell.
    """
    assert BROWSER is not None
    (folder / "probe.html").write_text(html)
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",  # containers have next to none
        "--no-first-run",
        "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=20000",
        "--dump-dom",
        (folder / "probe.html").as_uri(),
    ]
    own = os.environ | {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder / "config")}
    try:
        done = subprocess.run(command, capture_output=True, timeout=120, env=own)
    except subprocess.TimeoutExpired:
        return None
    text = done.stdout.decode(errors="replace")
    found = re.search(r'<p id="found">([^<]+)</p>', text)
    return None if found is None else unescape(found[1])


def probe(html: str, folder: Path, column: int = 1, width: int = PHONE) -> dict[str, Any]:
    """What a browser makes of a page in a frame as wide as a phone. Skips where a browser runs no script at all."""
    (folder / "page.html").write_text(html)
    outer = PROBE.replace("COLUMN", str(column)).replace("WIDTH", str(width))
    if found := found_in(outer, folder) or found_in(outer, folder):  # a busy machine may need two
        return json.loads(found)
    if found_in(SIMPLEST, folder) is None:
        pytest.skip("the browser here does not run: it shows nothing of the simplest page")
    raise AssertionError("the browser runs, and the page's script has not come to its end in it")


@pytest.mark.skipif(
    BROWSER is None,
    reason="no Chromium or Chrome is installed, and the page is tested in a real one",
)
def test_in_a_browser_as_narrow_as_a_phone_it_sorts_leads_and_overflows_nowhere(
    html: str, tmp_path: Path
) -> None:
    found = probe(html, tmp_path)
    assert found["width"] <= found["seen"] <= PHONE
    assert (
        found["up"] == sorted(found["up"], key=int)
        and found["down"] == found["up"][::-1]
        and len(set(found["up"])) == 3
    )
    assert (found["closed"], found["open"]) == (False, True)
    assert found["drawn"] and not found["loaded"]
    wide = html.replace(
        "<h2>Runs</h2>", '<h2 style="width: 900px">Runs</h2>'
    )  # the control: what overflows is seen
    (tmp_path / "wide").mkdir()
    assert probe(wide, tmp_path / "wide")["width"] > PHONE


def test_runs_with_the_same_bases_share_a_curve_of_their_spectrum(
    found: Results, drawn: dict[str, files.Drawing]
) -> None:
    def curves(drawing: files.Drawing) -> int:
        return drawing.svg.count("directions kept")

    assert curves(drawn["spectra-mlp"]) == 1  # twelve runs, whose bases are alike
    first = next(iter(found.spectra))
    other = found.spectra | {first: {"mlp.0": [2.0 ** -(j / 2) for j in range(64)]}}
    two = figures(replace(found, spectra=other))
    assert curves(next(d for d in two if d.name == "spectra-mlp")) == 2


def test_energies_that_say_nothing_are_left_out() -> None:
    assert energy_lost(
        {"a": [3.0, 1.0], "b": [1.0, 1.0], "c": [2.0, 1.0]}, {"a": 1, "b": 1, "c": 2}
    ) == {"a": 0.25}
