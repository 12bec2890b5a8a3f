"""The page of a study: it loads nothing, says what was found, and works in a real browser, on a phone too."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pages import Page

from invariance.report.energy import energy_lost
from invariance.report.study_charts import ticks
from invariance.study.page import figures, page
from invariance.study.study import Study, load_study
from invariance.study.table import row

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
PHONE = 390  # CSS pixels, the width of many phones
NASTY = "<script>alert('1')</script>"

PROBE = """<!doctype html><iframe id="f" width="WIDTH" height="800" src="page.html"></iframe><p id="found"></p><script>
const frame = document.getElementById('f');
frame.addEventListener('load', () => {
  const page = frame.contentDocument, root = page.documentElement, names = () =>
    [...page.querySelectorAll('#runs tbody tr')].map(r => r.children[COLUMN].textContent);
  const heading = page.querySelectorAll('#runs thead button')[COLUMN];
  heading.click(); const up = names(); heading.click(); const down = names();
  const point = page.querySelector('svg a'), id = point.getAttribute('href').slice(1);
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


def report(width: int, perplexity: float, parameters: int) -> dict[str, Any]:
    dims = {f"mlp.{i}": 64 for i in range(6)}
    return {
        "model": {"name": NASTY, "stock": True},
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
        "tokens_per_second": {"dense": None, "sliced": None},
        "exactness": {"relative_error": 1e-15},
        "widths": dict.fromkeys(dims, width),
        "dims": dims,
        "kinds": dict.fromkeys(dims, "mlp"),
    }


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "made up.yaml").write_text(f"""
base: {{model: m, calibrate: {{data: t.npy}}, steps: [{{spaces: mlp, rotate: permute, select: {{uniform: {{keep: 0.5}}}}}}]}}
grid:
  method:
    "{NASTY}": {{steps.0.slice: least_squares}}
    a method with a name that is much longer than any phone is wide, for once: {{steps.0.slice: truncate}}
  steps.0.select.uniform.width: [16, 32, 48]
  seed: [0, 1]
""")
    return load_study(tmp_path / "made up.yaml")


@pytest.fixture
def found(study: Study) -> tuple[list[Any], dict[str, Any], dict[str, Any], dict[str, str]]:
    """Rows, reports, spectra and recipes of a study's runs, of which one failed."""
    rows, reports, spectra, recipes = [], {}, {}, {}
    for n, variant in enumerate(study.variants()):
        width = int(str(variant.varied["steps.0.select.uniform.width"]))
        name = f"{n:016x}"
        if n == 5:
            rows.append(row(name, variant.varied, None, "failed", f"no reason {NASTY}"))
            continue
        reports[name] = report(width, 10 + (64 - width) / 8 + n / 10, 100 + 10 * width)
        spectra[name] = {f"mlp.{i}": [2.0 ** -(j / 8) for j in range(64)] for i in range(6)}
        recipes[name] = f"model: {NASTY}\n" + "steps: " + "x" * 300
        rows.append(row(name, variant.varied, reports[name], "done"))
    return rows, reports, spectra, recipes


@pytest.fixture
def html(study: Study, found: Any) -> str:
    return page(study, *found)


def test_charts_stand_alone_as_files_that_load_nothing_and_name_their_series(
    study: Study, found: Any
) -> None:
    rows = found[0]
    drawn = figures(study, rows)
    assert set(drawn) == {"front", "curves"}
    for text in drawn.values():
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not re.search(r"href|@import|url\(", text) and "<script" not in text
        said = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
        assert {"Perplexity over width", "Perplexity over parameters"} & set(said)
        assert NASTY in said and sum(t is not None and t.endswith("…") for t in said) == 1
        _, top, _, height = map(float, root.attrib["viewBox"].split())
        keys = [t for t in root.iter("{http://www.w3.org/2000/svg}circle") if t.get("r") == "3"]
        assert len(keys) == 2 and all(float(k.attrib["cy"]) + 3 < top + height for k in keys)
    points = ElementTree.fromstring(drawn["front"]).iter("{http://www.w3.org/2000/svg}a")
    assert len(list(points)) == 11
    assert figures(study, [r for r in rows if r["status"] != "done"]) == {}


def test_along_a_column_of_the_results_a_curve_joins_all_widths(study: Study, found: Any) -> None:
    along = replace(study, options=study.options.model_copy(update={"x": "parameters"}))
    whole, usual = (ElementTree.fromstring(figures(s, found[0])["curves"]) for s in (along, study))
    for root in (whole, usual):  # a series each of two methods
        assert (
            len(re.findall("class=.curve thick", ElementTree.tostring(root, encoding="unicode")))
            == 2 + 2
        )


def test_the_page_loads_nothing_runs_its_own_script_only_and_escapes_all(html: str) -> None:
    assert not re.search(r"https?://|@import|url\(", html)
    assert html.count("<script>") == 1 and re.search(r"script-src 'sha256-[\w+/=]{44}'", html)
    found = Page(html)
    assert not {
        a for _, attributes in found.tags for a in attributes if a == "src" or a.startswith("on")
    }
    assert found.text.count(NASTY) > 5 and "no reason" in found.text


def test_every_point_and_row_leads_to_a_recipe_that_is_there(html: str) -> None:
    tags = Page(html).tags
    targets = {a["href"] for tag, a in tags if tag == "a"}
    assert len(targets) == 11 and targets == {f"#{a['id']}" for tag, a in tags if tag == "pre"}


def test_bands_span_the_seeds_and_heat_maps_have_a_cell_a_layer(html: str) -> None:
    classes = [a.get("class") for _, a in Page(html).tags]
    assert classes.count("band") == 2  # a series each
    assert classes.count("heat") == 2 * 11 * 6  # widths and energies, runs, layers


def probe(html: str, folder: Path, column: int = 1, width: int = PHONE) -> dict[str, Any]:
    """What a browser makes of a page in a frame as wide as a phone."""
    assert BROWSER is not None
    outer = PROBE.replace("COLUMN", str(column)).replace("WIDTH", str(width))
    (folder / "page.html").write_text(html)
    (folder / "probe.html").write_text(outer)
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=20000",
        "--dump-dom",
        (folder / "probe.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r'<p id="found">(\{.*?\})</p>', done.stdout, re.DOTALL)
    assert found, done.stderr[-1000:]
    return json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))


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


def test_runs_with_the_same_bases_share_a_curve_of_their_spectrum(html: str) -> None:
    drawn = [m for m in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if "Spectra of the" in m]
    assert (
        len(drawn) == 1 and drawn[0].count('class="curve"') == 1
    )  # twelve runs, whose bases are alike


def test_energies_that_say_nothing_are_left_out() -> None:
    assert energy_lost(
        {"a": [3.0, 1.0], "b": [1.0, 1.0], "c": [2.0, 1.0]}, {"a": 1, "b": 1, "c": 2}
    ) == {"a": 0.25}


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.1, 3.2), (9.9e7, 1.4e8), (-5.0, 12.0)])
def test_ticks_lie_between_the_bounds_under_different_labels(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and len(set(found.values())) == len(found)
    assert all(low <= v <= high for v in found)
