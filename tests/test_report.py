"""The report, opened in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from conftest import with_repeats

from circuits import report
from circuits._io import read_json, write_json
from circuits._style import ON_DARK, PAGES, VERDICT_COLOURS
from circuits.mechanisms import LABELS
from circuits.report.content import MEANINGS, build
from circuits.report.in_words import in_words
from circuits.study.analyse import record
from circuits.study.calibration import SIZES, Calibration
from circuits.study.study import Study, run

ARTIFACTS = Path(__file__).parent / "artifacts"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror=window.hacked=2> ‮ \U0001f9ea"

STUDY = f"""
name = "browser"
title = {HOSTILE!r}
seeds = [0, 1]

[[recipe]]
name = "answer {HOSTILE}"
stages = [{{ objective = "answer", weight_decay = 1.0 }}]

[[recipe]]
name = "reinforce, random reward"
stages = [{{ objective = {{ name = "reinforce", reward = "random" }} }}]

[[cell]]
name = "a + b mod 7 {HOSTILE}"
task = {{ name = "modular-addition", p = 7, block = 2, train_fraction = 0.7 }}
model = {{ d_model = 16, n_heads = 2 }}
recipes = ["answer {HOSTILE}", "reinforce, random reward"]
stage = {{ steps = 60, learning_rate = 1e-2 }}
why = "hostile </script> text {HOSTILE}"
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(STUDY, encoding="utf-8")
    return run(folder / "study.toml", out=folder / "out", progress=False)


@pytest.fixture(scope="module")
def page_file(study) -> Path:
    return report.write(study)


# Titles, legends and what is written around the axes: none is cut off by its figure, none lies upon another.
CLASHES = """() => {
  const found = [];
  for (const place of document.querySelectorAll(".plot")) {
    const frame = place.getBoundingClientRect();
    const boxes = [];
    const written = "text.gtitle, .infolayer [class^=g-][class$=title] text, g.legend, g.annotation";
    for (const one of place.querySelectorAll(written)) {
      const box = one.getBoundingClientRect();
      if (box.width) boxes.push([one.textContent.slice(0, 40), box]);
    }
    boxes.forEach(([text, box], i) => {
      const beside = box.left < frame.left - 2 || box.right > frame.right + 2;
      if (beside || box.top < frame.top - 2 || box.bottom > frame.bottom + 2)
        found.push(`${place.getAttribute("aria-label")}: "${text}" is cut off`);
      for (const [other, its] of boxes.slice(i + 1)) {
        const across = Math.min(box.right, its.right) - Math.max(box.left, its.left);
        const down = Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top);
        if (across > 1 && down > 1)
          found.push(`${place.getAttribute("aria-label")}: "${text}" lies upon "${other}"`);
      }
    });
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        instance = started.chromium.launch(executable_path=chromium, args=FLAGS)
        yield instance
        instance.close()


def opened(browser, file, *, width=1280, scheme="light"):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else problems.append(r.url))
    page.goto(file.as_uri())
    return page, problems


def test_report_is_one_escaped_offline_file(page_file):
    text = page_file.read_text(encoding="utf-8")
    assert "<script>window.hacked" not in text
    assert "default-src 'none'" in text and "connect-src 'none'" in text
    assert page_file.stat().st_size < 7_000_000
    assert text.count("plotly.js v") == 1


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (420, "dark")])
def test_every_figure_is_drawn_and_nothing_overflows(browser, page_file, width, scheme):
    page, problems = opened(browser, page_file, width=width, scheme=scheme)
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"report-{width}-{scheme}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    expected = page.locator(".plot").count()
    assert expected >= 6
    assert page.evaluate("window.drawEverything()") == expected
    assert page.locator(".plot .main-svg").count() >= expected
    for place in page.locator(".plot").all():
        assert place.locator("svg.main-svg").first.bounding_box()["width"] > 100
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CLASHES) == []
    page.screenshot(path=ARTIFACTS / f"report-{width}-{scheme}-full.png", full_page=True)
    assert page.evaluate("window.hacked") is None
    assert problems == []
    page.close()


@pytest.mark.parametrize("width", [1280, 420])
def test_verdict_matrix_is_readable_by_role(browser, page_file, study, width):
    page, problems = opened(browser, page_file, width=width)
    table = page.get_by_role("table", name="Verdict by recipe and task")
    assert table.get_by_role("columnheader").count() == 2
    rows = table.get_by_role("rowheader")
    assert rows.count() == 2
    assert rows.nth(1).inner_text() == "reinforce, random reward"
    cells = table.get_by_role("cell")
    labels = set(study.table["label"])
    assert any(label in cells.nth(0).inner_text() for label in labels)
    assert "of 2 seeds" in cells.nth(0).inner_text()
    # blocks instead of table boxes, as on a narrow page, lose the roles that are not written out in some browsers
    assert page.locator(".matrix :is(thead, tbody, tr, th, td):not([role])").count() == 0
    assert page.locator("table.matrix[role=table]").count() == 1
    assert page.get_by_role("main").count() == 1
    assert page.get_by_role("heading", level=1).count() == 1
    assert problems == []
    page.close()


def test_keyboard_reaches_the_evidence_and_the_theme(browser, page_file):
    page, problems = opened(browser, page_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    button = page.get_by_role("button", name="Dark theme", exact=True, pressed=False)
    button.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.get_by_role("button", name="Dark theme", exact=True, pressed=True).count() == 1
    link = page.locator(".matrix a.chip").first
    link.focus()
    page.keyboard.press("Enter")
    page.locator("details.card[open]").first.wait_for(timeout=5000)
    page.locator("details.card[open] .plot").first.scroll_into_view_if_needed()
    page.locator("details.card[open] .plot svg.main-svg").first.wait_for(state="attached", timeout=15000)
    assert problems == []
    page.close()


def ground(page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme_is_the_systems_without_any_script_until_the_button_says_otherwise(browser, page_file, scheme):
    other = {"light": "dark", "dark": "light"}[scheme]
    still = browser.new_context(java_script_enabled=False, color_scheme=scheme)
    page = still.new_page()
    page.goto(page_file.as_uri())
    assert ground(page) == rgb(PAGES[scheme]["bg"])
    still.close()
    page, problems = opened(browser, page_file, scheme=scheme)
    page.get_by_role("button", name="Dark theme", pressed=scheme == "dark").click()
    assert ground(page) == rgb(PAGES[other]["bg"])
    page.emulate_media(color_scheme=other)
    page.emulate_media(color_scheme=scheme)
    assert ground(page) == rgb(PAGES[other]["bg"])
    assert page.get_by_role("button", name="Dark theme", pressed=other == "dark").count() == 1
    assert problems == []
    page.close()


@pytest.mark.parametrize("width", with_repeats([1280, 420], {1280}))
def test_figures_are_drawn_in_the_colours_of_the_theme(browser, page_file, width):
    page, problems = opened(browser, page_file, width=width)
    page.evaluate("window.drawEverything()")
    lines = 'document.querySelectorAll(".plot .scatterlayer path.js-line")'
    strokes = f"Array.from({lines}, (path) => path.style.stroke)"
    light, dark = ({rgb(colour) for colour in colours} for colours in (ON_DARK, ON_DARK.values()))
    before = set(page.evaluate(strokes))
    assert before and before <= light
    page.get_by_role("button", name="Dark theme").click()
    page.evaluate("window.drawEverything()")
    after = set(page.evaluate(strokes))
    assert after <= dark and len(after) == len(before)
    assert problems == []
    page.close()


def colours_of(part: object) -> set[str]:
    if isinstance(part, str):
        return {part} if re.fullmatch("#[0-9a-f]{6}", part) else set()
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return set().union(*map(colours_of, inner))


def test_figures_have_house_colours_and_only_evidence_has_a_verdicts(study):
    verdicts = set(VERDICT_COLOURS.values())
    titles = set()
    for figure in map(json.loads, (item["json"] for item in build(study)["figures"])):
        title = figure["layout"]["title"]["text"]
        titles.add(title.split()[0])
        for trace in figure["data"]:
            parts = [trace.get("line", {}), {k: v for k, v in trace.get("marker", {}).items() if k != "colorscale"}]
            used = colours_of(parts)
            assert used <= set(ON_DARK), title
            assert not used & verdicts or title.startswith("Evidence for"), title
    assert {"Training", "Evidence", "Fourier"} <= titles


def test_every_figure_is_said_in_words(study, page_file):
    figures = build(study)["figures"]
    said = re.findall(
        r'class="visually-hidden" id="(figure-\d+)-words">([^<]+)<', page_file.read_text(encoding="utf-8")
    )
    assert [number for number, _ in said] == [figure["id"] for figure in figures]
    assert all(re.search(r"\d", words) for _, words in said)


def test_words_have_the_numbers_of_the_figure():
    figure = go.Figure(
        [
            go.Scatter(x=[1, 2, 3, 4, 5], y=[0.5, 0.25, math.nan, 0.75, 1.0], name="seen <i>pairs</i>"),
            go.Scatter(x=[None], y=[None], name="only in the legend"),
            go.Scatter(x=[0.125, 1.0], y=["spectral", "block-gap"], name="model"),
            go.Bar(x=[3, 5, 7], y=[0.1, 0.7, 0.2], name="embedding"),
            go.Scatter(x=[0, 1], y=[0, 1], text=["embed → m0<br>score -2.5<br>more"] * 2),
            go.Heatmap(z=[[0, 1], [2, 30]]),
        ]
    )
    figure.update_layout(xaxis_title="step", yaxis_title="accuracy")
    assert in_words(figure) == (
        "across: step; up: accuracy. seen pairs: 0.5 at 1, 1 at 5, between 0.25 and 1. "
        "model: spectral 0.125, block-gap 1. embedding, the largest of 3: 0.7 at 5, 0.2 at 7, 0.1 at 3. "
        "1 heat map of 2 by 2 cells: values from 0 to 30. The largest of 1 edge: embed → m0 score -2.5."
    )


def test_legend_and_documentation_say_the_same_of_every_label():
    text = (Path(__file__).parent.parent / "docs/concepts.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"^\| `([\w-]+)` \| (.+) \|$", text, flags=re.MULTILINE))
    assert {label: said[label] for label in LABELS} == MEANINGS


def altered(study: Study, folder: Path, ends: dict[int, tuple[str, str]]) -> Study:
    """A copy of a study in which some runs ended otherwise, with a message."""
    shutil.copytree(study.path, folder)
    other = Study.load(folder)
    for number, (status, message) in ends.items():
        record(other.plan[number], status, message=message)
    return other.rebuild()


def test_what_went_wrong_is_said_with_its_reason(study, tmp_path):
    reasons = {2: ("diverged", "the loss is nan at step 7"), 3: ("failed", "out of <memory>")}
    text = report.write(altered(study, tmp_path / "one", reasons)).read_text(encoding="utf-8")
    for said in ("diverged: the loss is nan at step 7", "failed: out of &lt;memory&gt;"):
        assert text.count(said) == 2  # in the section, and in the table of runs
    assert "2 runs failed or diverged and are listed at the end." in text


def test_headline_counts_one_as_one(study, tmp_path):
    all_but_one = altered(study, tmp_path / "one", {n: ("failed", "no") for n in (1, 2, 3)})
    assert build(all_but_one)["headline"].startswith("1 network was trained on 1 task by 1 recipe. Verdicts: 1 ")
    one = build(altered(study, tmp_path / "two", {3: ("diverged", "no")}))["headline"]
    assert one.startswith("3 networks were trained on 1 task by 2 recipes.")
    assert one.endswith(" of 1 combination of task and recipe. 1 run failed or diverged and is listed at the end.")


def test_versions_are_those_of_the_runs_and_named_where_they_differ(study, tmp_path):
    alike = build(study)
    manifest = read_json(study.plan[0].path / "manifest.json")
    assert dict(alike["made"]["rows"])["torch"] == manifest["versions"]["torch"]
    assert alike["made"]["differ"] == [] and alike["made"]["runs"] == "4 runs"
    other = altered(study, tmp_path / "other", {})
    manifest["versions"]["torch"] = "1.2.3"
    del manifest["threads"]
    write_json(other.plan[0].path / "manifest.json", manifest)
    (other.plan[1].path / "manifest.json").unlink()
    made = build(other)["made"]
    assert made["runs"] == "3 runs"
    rows = dict(made["rows"])
    assert "not recorded (1 run)" in rows["threads"]
    assert "torch" in made["differ"] and "1.2.3 (1 run)" in rows["torch"] and "(2 runs)" in rows["torch"]
    assert "python" not in made["differ"]


def test_methods_say_what_circuits_rest_on(study):
    text = report.write(study).read_text(encoding="utf-8")
    assert "on 128 pairs of a clean and a corrupt input" in text
    assert "with corrupt ablation: an edge that is left out carries what it carries on the corrupt input" in text


VERDICTS = [f"algorithm/{name}" for name in ("columns", "fourier", "number-line")]
VERDICTS += ["heuristics", "heuristics/range-lookup", "heuristics/result-range-bag", "memorisation/pairs"]
VERDICTS += [f"mixed/{name}" for name in ("columns", "fourier", "number-line")] + ["not-learned", "undetermined"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_confusion_matrix_of_every_verdict_fits(browser, tmp_path, scheme):
    rows = [
        {"family": family, "truth": truth, "spectral": 0.1 * number, "seed": seed, "size": "n 5"}
        for seed, truth in enumerate(VERDICTS)
        for number, family in enumerate(list(SIZES)[:3])
    ]
    frame = pd.DataFrame(rows).assign(nuisance="none", quick_agrees=True)
    frame[["label", "mechanism"]] = frame["truth"].str.extract("([^/]+)/?(.+)?").to_numpy()
    page, problems = opened(browser, report.write_calibration(Calibration(frame, tmp_path)), scheme=scheme)
    table = page.get_by_role("table", name="Number of models by truth and verdict")
    assert table.get_by_role("columnheader").count() == 1 + len(VERDICTS) + 4  # labels over their mechanisms
    assert table.get_by_role("rowheader").count() == len(VERDICTS)
    assert table.evaluate("t => t.parentElement.scrollWidth <= t.parentElement.clientWidth")
    assert ground(page) == rgb(PAGES[scheme]["bg"])
    assert problems == []
    page.close()


def test_tables_can_be_downloaded(browser, page_file, study):
    page, _ = opened(browser, page_file)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Table as CSV").click()
    text = Path(waiting.value.path()).read_text(encoding="utf-8")
    assert text.splitlines()[0].split(",")[:3] == ["cell", "task", "recipe"]
    assert len([line for line in text.splitlines() if "modular-addition" in line]) == len(study.table)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Table as LaTeX").click()
    assert "\\begin{tabular}" in Path(waiting.value.path()).read_text(encoding="utf-8")
    page.close()


def test_sections_of_names_that_look_alike_have_ids_of_their_own() -> None:
    from circuits.report.content import anchor

    ids = {anchor(cell, "r") for cell in ("a + b", "a - b", "a × b", "a ÷ b")}
    assert len(ids) == 4 and all(one.replace("-", "").isalnum() and one.isascii() for one in ids)
