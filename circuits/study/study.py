"""A study on disk, and how to run one."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from circuits._io import atomic_write, is_file, make_directory, storage_errors
from circuits.errors import BadInput, CorruptRun, IncompatibleRun
from circuits.runs import Run
from circuits.study import executor, read_toml, tables
from circuits.study.analyse import (
    Analysis,
    check_version,
    is_complete,
    read_manifest,
    read_verdict,
    record,
)
from circuits.study.game_analysis import GameAnalysis, assessments, game_columns
from circuits.study.grid import Spec, parse
from circuits.study.plan import Planned, plan, shard_of
from circuits.study.progress import Progress
from circuits.tasks.games import is_game
from circuits.worldmodels import Assessment


@dataclass(frozen=True)
class Failure:
    """Why a run of a study failed; ``refused``: by an error of ``circuits.errors``, hence again when tried again."""

    message: str
    refused: bool


@dataclass(frozen=True)
class Study:
    """A study's directory: what was planned, and what has come of it so far."""

    path: Path
    spec: Spec
    plan: tuple[Planned, ...]

    @staticmethod
    def load(path: Path | str) -> Study:
        """The study in a directory, finished or not.

        Raises:
            BadInput: the directory holds no study, or one that this version cannot read.
            StorageError: the directory may not be searched.
        """
        folder = Path(path)
        file = folder / "study.toml"
        if not is_file(file):
            raise BadInput(f"{folder} is not a study: it has no study.toml; expected a directory given to --out")
        spec = parse(read_toml(file), origin=str(file))
        return Study(folder, spec, plan(spec, folder))

    @property
    def table(self) -> pd.DataFrame:
        """One row per run, as in ``results.parquet``."""
        file = self.path / "results.parquet"
        return tables.read(file) if is_file(file) else self._rows()

    @functools.cached_property
    def runs(self) -> dict[str, Run]:
        """The trained runs by id."""
        return {run.id: Run.load(run.path) for run in self.plan if is_file(run.path / "manifest.json")}

    @property
    def failures(self) -> dict[str, Failure]:
        """How runs failed that did, by id; running the study again tries them again."""
        found: dict[str, Failure] = {}
        for run in self.plan:
            manifest = read_manifest(run.analysis)
            if manifest is not None and manifest["status"] == "failed":
                found[run.id] = Failure(str(manifest.get("message")), bool(manifest.get("refused")))
        return found

    def analysis(self, run_id: str) -> Analysis:
        """What was found out about a run.

        Raises:
            BadInput: the study has no such run.
            CorruptRun: its analysis is not finished, or damaged.
        """
        for run in self.plan:
            if run.id == run_id:
                return Analysis.load(run.analysis)
        raise BadInput(f"study {self.spec.name!r} has no run {run_id!r}: see the column run_id of its table")

    @property
    def report(self) -> Path:
        """The report, written now if it is missing or older than the table."""
        file, table = self.path / "report.html", self.path / "results.parquet"
        if is_file(file) and is_file(table) and file.stat().st_mtime_ns >= table.stat().st_mtime_ns:
            return file
        from circuits import report  # the one call upwards: the report knows studies, a study only where its own is

        return report.write(self)

    def check_version(self) -> None:
        """Return nothing.

        Raises:
            IncompatibleRun: another version analysed a run: a table made now would lack what it found.
        """
        for run in self.plan:
            check_version(run.analysis)

    def rebuild(self) -> Study:
        """Write the table again from the runs on disk, so that the report is due again, and return the study."""
        tables.write(self._rows(), self.path / "results.parquet")
        return self

    def summary(self) -> pd.DataFrame:
        """One row per cell and recipe, over seeds."""
        return tables.summary(self.table)

    def to_csv(self, path: Path | str) -> Path:
        """Write the table of all runs as CSV and return its path."""
        atomic_write(path, self.table.to_csv(index=False).encode())
        return Path(path)

    def to_latex(self, path: Path | str | None = None) -> str:
        """Return the summary over seeds as a LaTeX table (booktabs), and write it where a path is given."""
        text = tables.to_latex(self.table)
        if path is not None:
            atomic_write(path, text.encode())
        return text

    def _repr_html_(self) -> str:
        return f"<b>{self.spec.name}</b>" + self.summary().to_html(float_format=lambda v: f"{v:.3f}", index=False)

    def games(self) -> tuple[dict[str, GameAnalysis], dict[str, Assessment]]:
        """What was found out about the runs on games, and the verdicts, by the runs' ids.

        Raises:
            CorruptRun: an analysis is damaged.
        """
        found: dict[str, GameAnalysis] = {}
        for run in self.plan:
            if is_game(run.task):
                manifest = read_manifest(run.analysis)
                if manifest is not None and manifest["status"] == "done":
                    found[run.id] = GameAnalysis.load(run.analysis, manifest)
        return found, assessments(self.plan, found)

    def _rows(self) -> pd.DataFrame:
        analyses, verdicts = self.games()
        return tables.results(
            _row(run) | (game_columns(analyses[run.id], verdicts[run.id]) if run.id in analyses else {})
            for run in self.plan
        )


def _row(run: Planned) -> dict[str, Any]:
    row: dict[str, Any] = {
        "cell": run.cell,
        "task": run.task.name,
        "recipe": run.recipe.name,
        "objective": run.objective,
        "seed": run.seed,
        "why": run.why,
        "run_id": run.id,
        "status": "pending",
    }
    manifest = read_manifest(run.analysis)
    if manifest is None:
        return row
    row |= {key: manifest.get(key) for key in ("status", "steps", "seconds")}
    if manifest["status"] == "done" and not is_game(run.task):
        row |= tables.verdict_columns(read_verdict(run.analysis, manifest))
        if manifest["matched_steps"] is not None:
            row |= tables.matched_columns(read_verdict(run.analysis, manifest, matched=True), manifest["matched_steps"])
    return row


def run(
    preset_or_toml: str | Path,
    *,
    out: Path | str,
    workers: int | None = None,
    shard: str | None = None,
    progress: bool = True,
) -> Study:
    """Return the study after training and analysing every run that is not done yet.

    Args:
        preset_or_toml: a preset's name, or the path of a TOML file.
        out: the study's directory; what is done in it already is not done again.
        workers: processes at a time; None: the number of cores. More do not make it faster.
        shard: ``"i/n"``: only the i-th of n shares of the runs. The table covers what all shards finished so far.
        progress: show progress on standard error.

    Raises:
        BadInput: a name or value in the preset, or ``workers`` or ``shard``, cannot be used.
        IncompatibleRun: ``out`` holds another study.
        StorageError: ``out`` cannot be written.
    """
    text = read_toml(preset_or_toml)
    if workers is not None and (type(workers) is not int or workers < 1):
        raise BadInput(f"workers = {workers!r}: expected a whole number >= 1")
    executor.prepare()
    spec = parse(text, origin=str(preset_or_toml))
    folder = make_directory(out)
    planned_runs = plan(spec, folder)
    _check_other_study(folder, {planned.id for planned in planned_runs})
    atomic_write(folder / "study.toml", text.encode())
    study = Study(folder, spec, planned_runs)
    missing = [planned for planned in shard_of(study.plan, shard) if not _is_done(planned)]
    workers = workers or executor.cores()
    shown = Progress(missing, workers=workers, show=progress)
    try:
        outcomes = executor.execute(missing, workers=workers, watch=shown) if missing else []
    finally:
        shown.close()
    for outcome in outcomes:
        if outcome.error is not None and isinstance(outcome.job, Planned):
            # the executor tries everything again but an error of ours, which would come again
            refused = outcome.attempts <= executor.RETRIES
            record(outcome.job, "failed", message=outcome.error, refused=refused)
    return study.rebuild()


def _check_other_study(folder: Path, wanted: set[str]) -> None:
    with storage_errors(folder):
        there = {path.name for path in (folder / "runs").glob("*") if path.is_dir()}
    if there and not there & wanted:
        raise IncompatibleRun(
            f"{folder} holds another study, none of whose {len(there)} runs belongs to this one: choose another "
            "output directory"
        )


def _is_done(planned: Planned) -> bool:
    """Whether a run can be skipped; a damaged one is left to its worker, which says what is wrong with it."""
    try:
        return is_complete(planned)
    except CorruptRun:
        return False
