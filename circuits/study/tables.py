"""The results of a study as tables: one row per run, and a summary over seeds."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from circuits._io import atomic_write
from circuits.errors import CorruptRun
from circuits.mechanisms import TESTS, Verdict
from circuits.study.game_analysis import GAME_COLUMNS
from circuits.tasks.games import GAMES

DTYPES = {
    "cell": "string",
    "task": "string",
    "recipe": "string",
    "objective": "string",
    "seed": "Int64",
    "status": "string",
    "label": "string",
    "mechanism": "string",
    "accuracy": "Float64",
    "accuracy_block": "Float64",
    "accuracy_train": "Float64",
    "steps": "Int64",
    "seconds": "Float64",
    "matched_label": "string",
    "matched_mechanism": "string",
    "matched_accuracy": "Float64",
    "matched_steps": "Int64",
    "why": "string",
    **{column: "Float64" for test in TESTS for column in (test, f"{test}_low", f"{test}_high")},
    **dict.fromkeys(GAME_COLUMNS, "Float64"),
    "run_id": "string",
}
"""Columns of ``results.parquet`` in order. Accuracies are shares; ``accuracy`` is on pairs held out at random.
The columns ``matched_`` are of the first checkpoint that reached the accuracy at which recipes are compared. Columns of
tests are there where a run is on another task than a game, columns of probes where one is on a game; of a game,
``accuracy`` is the share of unseen positions at which the most probable token is legal."""


def results(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The results table: typed, every column of its kinds of tasks there, absent values NA."""
    frame = pd.DataFrame(list(rows))
    games = frame["task"].isin(GAMES)
    of_tests = {column for test in TESTS for column in (test, f"{test}_low", f"{test}_high")}
    left_out = (set() if games.any() else set(GAME_COLUMNS)) | (set() if (~games).any() else of_tests)
    columns = [name for name in DTYPES if name not in left_out]
    return frame.reindex(columns=columns).astype({name: DTYPES[name] for name in columns})


def verdict_columns(verdict: Verdict) -> dict[str, Any]:
    """What a verdict adds to a run's row: label, mechanism, accuracies, and each test's value with its interval."""
    row: dict[str, Any] = {"label": verdict.label, "mechanism": verdict.mechanism}
    for item in verdict.items:
        if item.value == item.value:
            low, high = item.interval
            row |= {item.test: item.value, f"{item.test}_low": low, f"{item.test}_high": high}
    if "accuracy-gate" in verdict:
        details = verdict["accuracy-gate"].details
        row |= {"accuracy": details.get("random"), "accuracy_train": details.get("train")}
        row["accuracy_block"] = details.get("block")
    return row


def matched_columns(verdict: Verdict, steps: int) -> dict[str, Any]:
    """What the verdict at matched accuracy adds to a run's row."""
    accuracy = verdict["accuracy-gate"].details.get("random")
    return {
        "matched_label": verdict.label,
        "matched_mechanism": verdict.mechanism,
        "matched_accuracy": accuracy,
        "matched_steps": steps,
    }


def write(table: pd.DataFrame, path: Path) -> None:
    """Write the table as parquet, atomically.

    Raises:
        StorageError: the directory cannot be written.
    """
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    atomic_write(path, buffer.getvalue())


def read(path: Path) -> pd.DataFrame:
    """The table that ``write`` wrote.

    Raises:
        CorruptRun: it cannot be read.
    """
    try:
        frame = pd.read_parquet(path)
        return frame.astype({name: DTYPES[name] for name in frame.columns})
    except (OSError, ValueError, KeyError) as error:
        raise CorruptRun(f"{path}: not a readable results table ({error}): run the study again") from error


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per cell and recipe, over seeds, in the study's order.

    ``verdict`` is the seeds' common label with its mechanism, or each one with the number of seeds that gave it;
    accuracies are means over seeds, with the lowest and highest seed.
    """
    done = table[table["status"] == "done"]
    rows = []
    for (cell, recipe), group in done.groupby(["cell", "recipe"], sort=False):
        row: dict[str, Any] = {"cell": cell, "recipe": recipe, "verdict": _common(group), "seeds": len(group)}
        for column in ("accuracy", "accuracy_block"):
            values = group[column].dropna()
            row[column] = values.mean() if len(values) else None
            row[f"{column}_low"] = values.min() if len(values) else None
            row[f"{column}_high"] = values.max() if len(values) else None
        rows.append(row)
    columns = ["cell", "recipe", "verdict", "seeds"]
    numbers = [f"{c}{end}" for c in ("accuracy", "accuracy_block") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*columns, *numbers])


def to_latex(table: pd.DataFrame) -> str:
    """The summary as a LaTeX table with booktabs rules, accuracies in percent with the range over seeds."""
    frame = summary(table)
    shown = pd.DataFrame(
        {
            "Task": frame["cell"],
            "Recipe": frame["recipe"],
            "Verdict": frame["verdict"],
            "Seeds": frame["seeds"].astype(str),
            "Accuracy (%)": [_percent(row, "accuracy") for row in frame.to_dict("records")],
            "Block (%)": [_percent(row, "accuracy_block") for row in frame.to_dict("records")],
        }
    )
    lines = [" & ".join(_escape(str(value)) for value in row) + r" \\" for row in shown.itertuples(index=False)]
    head = " & ".join(_escape(name) for name in shown.columns) + r" \\"
    rules = [r"\begin{tabular}{lllrll}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(rules) + "\n"


def _common(group: pd.DataFrame) -> str:
    names = [
        label if pd.isna(mechanism) else f"{label} ({mechanism})"
        for label, mechanism in zip(group["label"], group["mechanism"], strict=True)
    ]
    counts = Counter(names).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{name} x{count}" for name, count in counts)


def _percent(row: Mapping[Any, Any], column: str) -> str:
    if pd.isna(row[column]):
        return "-"
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    return f"{100 * row[column]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


def _escape(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)
