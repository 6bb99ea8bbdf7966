"""Calibration: rows are what single verdicts say, a second start computes nothing, and the figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from circuits import cli, mechanisms, reference
from circuits.errors import BadInput, UnknownName
from circuits.study import calibration
from circuits.study.calibration import Calibration, calibrate

SMALL = {
    "fourier-pizza": ({"p": 13, "frequencies": 2},),
    "number-line": ({"n": 12},),  # which has tests that a modular task has not, and lacks others
    "random-init": ({"p": 11},),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SIZES", SMALL)
    chosen = {name: calibration.NUISANCES[name] for name in ("none", "renamed tokens")}
    monkeypatch.setattr(calibration, "NUISANCES", chosen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests of this file calibrate, one after another: what one computed the next finds there."""
    return tmp_path_factory.mktemp("calibration")


def test_rows_are_single_verdicts_and_are_not_computed_twice(small: None, folder: Path) -> None:
    tmp_path = folder
    found = calibrate(tmp_path, seeds=2, progress=False)
    assert len(found.table) == 3 * (2 + 1)
    model, task, truth = reference.build("fourier-pizza", seed=1, p=13, frequencies=2)
    verdict = mechanisms.explain(model, task, budget="quick")
    table = found.table
    row = table[(table["family"] == "fourier-pizza") & (table["nuisance"] == "none") & (table["seed"] == 1)].iloc[0]
    assert (row["truth"], row["label"], row["mechanism"]) == (truth, verdict.label, verdict.mechanism)
    assert row["spectral"] == verdict["spectral"].value and row["size"] == "frequencies 2, p 13"
    assert set(table.loc[table["family"] == "random-init", "label"]) == {"not-learned"}
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    again = calibrate(tmp_path, seeds=2, progress=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == times
    pd.testing.assert_frame_equal(again.table, found.table)
    stored = pd.read_parquet(tmp_path / "calibration.parquet")
    named = {"family", "nuisance", "size", "seed", "truth", "label", "mechanism"}
    assert {*named, "accuracy-gate", *mechanisms.DECIDING, *mechanisms.MODULAR, "taxonomy"} <= set(stored)
    with_digits = stored["interchange.low_digit_of_a"].notna()
    assert with_digits.any() and stored.loc[with_digits, "family"].eq("number-line").all()
    # one untouched model of each size is given every test
    assert stored.loc[stored["taxonomy"].notna(), "seed"].eq(0).all()


def table(rows: list[tuple[str, str, str, str | None, float]], path: Path) -> Calibration:
    frame = pd.DataFrame(rows, columns=["family", "truth", "label", "mechanism", "spectral"])
    return Calibration(frame.assign(size="n 5", seed=range(len(frame))), path)


def test_the_figures_add_up(tmp_path: Path) -> None:
    found = table(
        [
            ("fourier-clock", "algorithm/fourier", "algorithm", "fourier", 1.0),
            ("fourier-clock", "algorithm/fourier", "undetermined", None, 0.9),
            ("range-lookup", "heuristics/range-lookup", "algorithm", "fourier", 0.4),
            ("range-lookup", "heuristics/range-lookup", "heuristics", None, 0.3),
            ("columns", "not-learned", "not-learned", None, 0.0),
        ],
        tmp_path,
    )
    found.table["nuisance"], found.table["seed"] = "none", [0, 1, 0, 1, 0]
    found.table["quick_agrees"] = [True, False, False, True, True]
    figures = found.summary().set_index("figure")["value"]
    assert figures["models given every test"] == 3
    assert figures["share of these on which the quick budget agrees"] == pytest.approx(2 / 3)
    assert figures["models that have learned"] == 4
    assert figures["share called by label and mechanism"] == 0.25
    assert figures["share called by label"] == 0.5
    assert figures["heuristics called algorithms"] == 1 and figures["algorithms called heuristics"] == 0
    assert figures["share undetermined"] == 0.25
    assert found.confusion().loc["algorithm/fourier", "undetermined"] == 1
    separation = found.separation()
    assert separation["auroc"].tolist() == [1.0] and separation["test"].tolist() == ["spectral"]
    left = found.left_out().set_index("family")
    assert left.loc["fourier-clock", "rule"] == 0.5 and left.loc["range-lookup", "rule"] == 0.5


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="unknown family 'fourier-clok': did you mean 'fourier-clock'"):
        calibrate(tmp_path, families=["fourier-clok"])
    with pytest.raises(BadInput, match="seeds = 0"):
        calibrate(tmp_path, seeds=0)


def test_every_reference_is_calibrated_on_in_three_sizes() -> None:
    assert set(calibration.SIZES) == set(reference.REFERENCES) | set(reference.TRAINED)
    assert set(calibration.STORED) == set(reference.TRAINED)
    assert all(len(sizes) >= 3 for name, sizes in calibration.SIZES.items() if name not in calibration.STORED)
    assert {kind for kind, _ in calibration.NUISANCES.values()} >= set(reference.NUISANCES)


def test_the_command_writes_a_page_and_prints_the_figures(
    small: None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["calibrate", "--out", str(folder), "--seeds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "share undetermined" in printed and "report.html" in printed
    page = (folder / "report.html").read_text()
    assert "algorithm/fourier" in page and "http://" not in page
    assert cli.main(["calibrate", "--out", str(folder), "--seeds", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 9
