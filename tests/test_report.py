"""The report, opened in a real browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from circuits import report
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
    assert text.count("plotly.js v") <= 1


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (420, "light"), (420, "dark")])
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
    page.screenshot(path=ARTIFACTS / f"report-{width}-{scheme}-full.png", full_page=True)
    assert page.evaluate("window.hacked") is None
    assert problems == []
    page.close()


def test_verdict_matrix_is_readable_by_role(browser, page_file, study):
    page, problems = opened(browser, page_file)
    table = page.get_by_role("table", name="Verdict by recipe and task")
    assert table.get_by_role("columnheader").count() == 2
    rows = table.get_by_role("rowheader")
    assert rows.count() == 2
    assert rows.nth(1).inner_text() == "reinforce, random reward"
    cells = table.get_by_role("cell")
    labels = set(study.table["label"])
    assert any(label in cells.nth(0).inner_text() for label in labels)
    assert "of 2 seeds" in cells.nth(0).inner_text()
    assert page.get_by_role("main").count() == 1
    assert page.get_by_role("heading", level=1).count() == 1
    assert problems == []
    page.close()


def test_keyboard_reaches_the_evidence_and_the_theme(browser, page_file):
    page, problems = opened(browser, page_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    button = page.get_by_role("button", name="Dark")
    button.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    link = page.locator(".matrix a.chip").first
    link.focus()
    page.keyboard.press("Enter")
    page.locator("details.card[open]").first.wait_for(timeout=5000)
    page.locator("details.card[open] .plot").first.scroll_into_view_if_needed()
    page.locator("details.card[open] .plot svg.main-svg").first.wait_for(state="attached", timeout=15000)
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
