"""A study of a game from the preset to the report: what its table has, what its page shows, what the commands say."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_report import opened

from circuits import cli, worldmodels
from circuits.errors import BadInput, CorruptRun
from circuits.report.games import MEANINGS, SHARED
from circuits.study import Study, run
from circuits.study.game_analysis import NUMBERS, PLANTED, TOLD, UNTRAINED, GameAnalysis, assessments, column
from circuits.study.grid import parse


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return run("games-smoke", out=tmp_path_factory.mktemp("games"), progress=False)


@pytest.fixture(scope="module")
def page(study: Study) -> Iterator[tuple[Any, list[str]]]:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened(browser, study.report)
        browser.close()


def test_every_run_has_a_row_with_a_column_for_every_probe(study: Study) -> None:
    table = study.table
    assert table["status"].eq("done").all() and list(table["task"].unique()) == ["lattice"]
    assert set(table["objective"]) == {"next-token", TOLD, UNTRAINED}
    wanted = {
        "d_ib_same_legal",
        "d_ib_other_legal",
        "r_ib",
        "exact_legal_set",
        "label",
        "seed",
        "labels",
        "state_overlap",
    }
    assert wanted | {column(name) for name in worldmodels.PROBES} <= set(table.columns)
    assert not {"spectral", "slice-transfer"} & set(table.columns), "tests are of other tasks"
    rows = {row["objective"]: row for row in table.to_dict("records")}
    assert rows[UNTRAINED]["label"] == "not-learned"
    assert rows[TOLD]["inductive_bias"] > rows[UNTRAINED]["inductive_bias"] + 0.5
    assert rows[TOLD]["state_probe"] > 0.95 > rows[UNTRAINED]["state_probe"] + 0.2
    for score in worldmodels.SCORES:
        known = [rows[name][f"score_{column(score)}"] for name in (UNTRAINED, TOLD)]
        assert known == [0, 1] or pd.isna(known).all()
    assert rows[TOLD]["labels_total"] == pytest.approx(rows[TOLD]["labels"] + rows["next-token"]["labels"], rel=0.01)
    assert rows["next-token"]["labels"] == pytest.approx(150 * 64 * 15, rel=0.01)


def test_numbers_are_those_of_the_readings(study: Study) -> None:
    analyses, verdicts = study.games()
    for row in study.table.to_dict("records"):
        readings = analyses[row["run_id"]].readings
        assert set(readings) == set(worldmodels.PROBES)
        for name, (probe, key) in NUMBERS.items():
            number = readings[probe].number(key)
            assert row[name] == number or (math.isnan(number) and row[name] != row[name])
        assert row["label"] == verdicts[row["run_id"]].label
    told = next(planned for planned in study.plan if planned.objective == TOLD)
    # without its controls a run stands between 0 and 1
    alone = assessments([told], analyses)[told.id]
    assert alone.controls.startswith("0: a statistic of 0; 1: state, 1 seeds")


def test_a_second_start_does_nothing_and_a_damaged_analysis_is_refused(study: Study, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(study.path, copy)
    times = {path: path.stat().st_mtime_ns for path in copy.glob("runs/*/analysis/readings.json")}
    again = run("games-smoke", out=copy, progress=False)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert again.table.drop(columns="seconds").equals(study.table.drop(columns="seconds"))
    damaged = next(iter(times))
    damaged.write_text(damaged.read_text().replace("0", "1", 1))
    with pytest.raises(CorruptRun, match=r"readings\.json was altered"):
        Study.load(copy).games()
    manifest = json.loads((damaged.parent / "manifest.json").read_text())
    with pytest.raises(CorruptRun):
        GameAnalysis.load(damaged.parent, manifest)


def test_the_page_has_a_section_of_world_models(study: Study, page: tuple[Any, list[str]]) -> None:
    tab, problems = page
    assert tab.locator("#world-models h3").inner_text() == "lattice of 4"
    table = tab.get_by_role("region", name="Headline figures, lattice of 4, scrolls sideways")
    assert table.get_by_role("row").count() == 4
    assert tab.locator("#evidence").count() == 0, "no task but games has evidence"
    expected = tab.locator(".plot").count()
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("window.drawEverything()") == expected >= 7
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1280
    assert problems == []
    text = study.report.read_text(encoding="utf-8")
    for meaning in (*MEANINGS.values(), *SHARED.values()):
        assert meaning in text


def test_the_command_explains_a_run_on_a_game(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = next(planned for planned in study.plan if planned.objective == TOLD)
    assert cli.main(["explain", str(told.path), "--budget", "quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "random weights" in printed and "distinguishes" in printed
    assert worldmodels.Assessment.load(tmp_path).label in printed
    assert cli.main(["discover", str(told.path)]) == 2
    assert "which has no clean and corrupt pairs" in capsys.readouterr().err


def test_presets_have_every_control_in_every_cell() -> None:
    from circuits.study import read_toml
    from circuits.study.plan import plan

    runs = plan(parse(read_toml("games")), Path("x"))
    cells = {planned.cell for planned in runs}
    assert len(cells) == 4 and {planned.seed for planned in runs} == {0, 1, 2}
    for cell in cells:
        objectives = {planned.objective for planned in runs if planned.cell == cell}
        assert {
            UNTRAINED,
            TOLD,
            PLANTED,
            "next-token",
            "legal-set",
            "simulate",
            "simulate (taken)",
            "value",
        } <= objectives
    best = {planned.objective for planned in runs if planned.recipe.name == "next-token, best play"}
    assert best == {"next-token (shortest-path)"}


def test_what_a_cell_leaves_open_a_recipe_may_say() -> None:
    text = """
name = "x"
[[recipe]]
name = "a"
stages = [{ objective = "state" }, { objective = "next-token", steps = 7, trained = "unembedding" }]
[[cell]]
task = "lattice"
recipes = ["a"]
stage = { steps = 9, batch_size = 4 }
"""
    stages = parse(text).cells[0].recipes[0].stages
    assert [stage.steps for stage in stages] == [9, 7] and parse(text).cells[0].name == "lattice, size = 5"
    with pytest.raises(BadInput, match="policy of lattice"):
        parse(text.replace('objective = "state" }', 'objective = "state", policy = "expert" }'))
    with pytest.raises(BadInput, match="batch_size = None"):
        parse(text.replace(", batch_size = 4", ""))
