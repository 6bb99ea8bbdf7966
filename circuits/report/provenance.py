"""How a study came about: what trained its runs, what scored its circuits, and why a run has no verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from circuits._io import read_json
from circuits.errors import CorruptRun
from circuits.study.analyse import PAIRS, Analysis, read_manifest
from circuits.study.study import Study

MADE_WITH = ("platform", "threads", "commit")
"""What a run's manifest holds besides versions."""


def made_with(study: Study) -> dict[str, Any]:
    """Return what the runs were trained with, by their own manifests, and in what of it they differ.

    A run that failed has left no manifest; one that cannot be read counts as none.
    """
    facts: dict[str, Counter[str]] = {}
    n_runs = 0
    for run in study.plan:
        try:
            manifest = read_json(run.path / "manifest.json")
            found = {**manifest["versions"], **{key: manifest[key] for key in MADE_WITH if key in manifest}}
        except (CorruptRun, KeyError, TypeError):
            continue
        n_runs += 1
        for name, value in found.items():
            facts.setdefault(name, Counter())[_said(name, value)] += 1
    rows = [(name, _values(counts, n_runs)) for name, counts in facts.items()]
    return {
        "rows": rows,
        "runs": counted(n_runs, "run"),
        "differ": [name for name, counts in facts.items() if counts.total() < n_runs or len(counts) > 1],
    }


def _said(name: str, value: object) -> str:
    if name == "commit":
        return "none: an installed package" if value is None else str(value)[:12]
    return str(value)


def _values(counts: Counter[str], n_runs: int) -> str:
    if counts.total() < n_runs:
        counts = counts + Counter({"not recorded": n_runs - counts.total()})
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({counted(n, 'run')})" for value, n in counts.most_common())


def circuits_by(analyses: Iterable[Analysis]) -> dict[str, Any]:
    """Return by which methods edges were scored, and how the faithfulness of the circuits was measured."""
    every = list(analyses)
    circuits = [a.circuit for a in every if a.circuit is not None]
    curves = [a.faithfulness for a in every if a.faithfulness is not None]
    used = sorted({curve.n_pairs for curve in curves})
    return {
        "pairs": PAIRS,
        "methods": sorted({f"{circuit.method} ({circuit.metric})" for circuit in circuits}),
        "ablations": sorted({curve.ablation for curve in curves}),
        "unseen": " to ".join(str(n) for n in sorted({used[0], used[-1]})) if used else "",
    }


def reasons(study: Study) -> dict[str, str]:
    """Return, by the run's id, why it diverged or failed, where its manifest says so."""
    found: dict[str, str] = {}
    for run in study.plan:
        try:
            manifest = read_manifest(run.analysis)
        except CorruptRun as error:
            found[run.id] = str(error)
            continue
        if manifest is not None and manifest.get("message"):
            found[run.id] = str(manifest["message"])
    return found


def counted(n: int, noun: str) -> str:
    """Return a number with its noun, which has an s but where the number is one."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
