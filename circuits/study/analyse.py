"""What a worker does with one run: train it, explain it, and keep what tables and figures need."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from circuits import discovery, mechanisms, training, worldmodels
from circuits._io import make_directory, read_json, sha256_file, storage_errors, write_json
from circuits.discovery import Circuit, Faithfulness
from circuits.errors import BadInput, CorruptRun, Diverged, IncompatibleRun
from circuits.mechanisms import Verdict
from circuits.runs import Run, versions
from circuits.study.figure_data import figure_data
from circuits.study.game_analysis import analyse_game
from circuits.study.plan import Planned
from circuits.tasks.base import Pairs
from circuits.tasks.games import is_game

FORMAT = 3
RULE = f"{mechanisms.VERSION}, {worldmodels.VERSION}"
"""The rules of both kinds of verdicts."""
PAIRS = 128
"""Clean and corrupt pairs that score the edges; as many others measure how faithful the circuit is."""
SHARES = (0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
"""Shares of the edges at which faithfulness is measured: all sizes would take longer than the training of some runs."""
BUDGET = "quick"
"""Tests of mechanisms that every run gets: those that the rule reads; ``circuits explain RUN`` has the others."""
MATCHED = 0.97
"""Accuracy on pairs held out at random at which recipes are compared besides their ends: training keeps the first
checkpoint that reaches it. It is above what the rule asks of a network that has learned its task, on fewer pairs."""


@dataclass(frozen=True)
class Analysis:
    """What was found out about one run; there is no circuit where nothing was learned."""

    verdict: Verdict
    circuit: Circuit | None
    faithfulness: Faithfulness | None
    figures: dict[str, Any]

    @staticmethod
    def load(folder: Path) -> Analysis:
        """The analysis that ``complete`` wrote into a folder.

        Raises:
            CorruptRun: there is none, or a file of it is missing or altered.
        """
        manifest = read_manifest(folder)
        if manifest is None or manifest["status"] != "done":
            raise CorruptRun(f"{folder} holds no finished analysis: run the study again")
        for name, digest in manifest["files"].items():
            if sha256_file(folder / name) != digest:
                raise CorruptRun(f"{folder / name} was altered: delete {folder} and run the study again")
        found = (folder / "circuit").is_dir()
        return Analysis(
            Verdict.load(folder),
            Circuit.load(folder / "circuit") if found else None,
            Faithfulness.load(folder / "faithfulness") if (folder / "faithfulness").is_dir() else None,
            read_json(folder / "figures.json"),
        )


def complete(run: Planned) -> None:
    """Train and analyse what is missing of a run; a run that diverges is recorded as such.

    A run whose files are damaged is deleted and trained again, which gives the same one.

    Raises:
        CircuitsError: the run cannot be trained or analysed.
    """
    torch.set_num_threads(1)
    try:
        _complete(run)
    except CorruptRun as error:
        print(f"{error}; {run.path} is deleted and made again")
        with storage_errors(run.path):
            shutil.rmtree(run.path)
        _complete(run)


def _complete(run: Planned) -> None:
    if is_complete(run):
        return
    started = time.perf_counter()
    try:
        trained = training.train(
            run.task, run.recipe, seed=run.seed, out=run.path, model=run.model, resume=True, progress=False
        )
    except Diverged as error:
        record(run, "diverged", message=str(error), seconds=time.perf_counter() - started)
        return
    seconds = time.perf_counter() - started
    analyse(trained, run.analysis)
    steps, spent = int(trained.metrics["step"].max()), time.perf_counter() - started - seconds
    record(run, "done", steps=steps, seconds=seconds, analysis_seconds=spent, matched_steps=matched_step(trained))


def analyse(run: Run, folder: Path) -> None:
    """Write verdict, circuit, faithfulness and figure data of a finished run into a folder; of a game, all readings."""
    with storage_errors(folder):
        shutil.rmtree(folder, ignore_errors=not folder.exists())
    make_directory(folder)
    task = run.task
    if is_game(task):
        analyse_game(run, task, folder)
        return
    verdict = mechanisms.explain(run.model, task, budget=BUDGET)
    verdict.save(folder)
    if (step := matched_step(run)) is not None:
        mechanisms.explain(run.checkpoint(step), task, budget=BUDGET).save(make_directory(folder / "matched"))
    if verdict.label != "not-learned":
        examples = task.pairs(PAIRS, seed=0)
        circuit = discovery.attribute(run.model, examples)
        circuit.save(folder / "circuit")
        others = task.pairs(PAIRS, seed=1)
        faithful = _faithfulness(run, circuit, examples, others)
        if faithful is not None:
            faithful.save(folder / "faithfulness")
    write_json(folder / "figures.json", figure_data(run.model, task, run.metrics))


def matched_step(run: Run) -> int | None:
    """The step of the first checkpoint with the accuracy ``MATCHED``; None if that was never reached."""
    reached = run.metrics.loc[run.metrics["accuracy_random"] >= MATCHED, "step"]
    steps = [step for step in run.checkpoints if len(reached) and step >= reached.min()]
    return min(steps, default=None)


def _faithfulness(run: Run, circuit: Circuit, seen: Pairs, others: Pairs) -> Faithfulness | None:
    """How faithful the circuit is on unseen pairs; None where the metric does not move when every edge is ablated."""
    try:
        unseen = others.without(seen)
        return discovery.faithfulness(run.model, circuit, unseen if len(unseen) else others, shares=SHARES)
    except BadInput as error:
        print(f"no faithfulness curve: {error}")
        return None


def record(run: Planned, status: str, **values: Any) -> None:
    """Write the analysis' manifest: how the run ended, and the sha256 of every file of the analysis."""
    make_directory(run.analysis)
    kept = [p for p in run.analysis.rglob("*") if p.is_file() and p.name[0] != "." and p.name != "manifest.json"]
    files = {path.relative_to(run.analysis).as_posix(): sha256_file(path) for path in sorted(kept)}
    made = {"format": FORMAT, "rule": RULE, "versions": versions()}
    manifest = {**made, "status": status, **values, "files": files}
    write_json(run.analysis / "manifest.json", manifest)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an analysis, None where there is none of this version and rule: then it is done again.

    Raises:
        CorruptRun: the manifest is damaged.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return None
    manifest = _manifest(folder)
    return manifest if (manifest["format"], manifest["rule"]) == (FORMAT, RULE) else None


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not {"format", "rule", "status", "files"} <= manifest.keys():
        raise CorruptRun(f"{path} is no manifest of an analysis: delete {folder} and run the study again")
    return manifest


def check_version(folder: Path) -> None:
    """Return nothing, as where there is no analysis yet.

    Raises:
        CorruptRun: the manifest is damaged.
        IncompatibleRun: another version wrote the analysis.
    """
    if not (folder / "manifest.json").exists() or read_manifest(folder) is not None:
        return
    manifest = _manifest(folder)
    raise IncompatibleRun(
        f"{folder} was written by rule {manifest['rule']!r} in analysis format {manifest['format']!r}, this version "
        f"has {RULE!r} and {FORMAT!r}: run the study again, which trains nothing anew, or use the "
        "version that wrote it"
    )


def read_verdict(folder: Path, manifest: Mapping[str, Any], *, matched: bool = False) -> Verdict:
    """The verdict of an analysis, or the one at matched accuracy.

    Raises:
        CorruptRun: it is missing or was altered.
    """
    name = "matched/verdict.json" if matched else "verdict.json"
    if sha256_file(folder / name) != manifest["files"].get(name):
        raise CorruptRun(f"{folder / name} was altered: delete {folder} and run the study again")
    return Verdict.load((folder / name).parent)


def is_complete(run: Planned) -> bool:
    """Whether a run needs nothing more: analysed, or known to diverge."""
    manifest = read_manifest(run.analysis)
    if manifest is None or manifest["status"] not in ("done", "diverged"):
        return False
    return manifest["status"] == "diverged" or (run.path / "manifest.json").exists()
