"""What a study finds out about a run on a game: what every probe reads, and the verdict between the cell's controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits import worldmodels
from circuits._io import from_json, read_json, sha256_file, to_json, write_json
from circuits.errors import BadInput, CorruptRun
from circuits.objectives.recipe import policy_of
from circuits.runs import Run
from circuits.study.figure_data import training_curves
from circuits.study.plan import Planned
from circuits.tasks.games import Game
from circuits.worldmodels import Assessment, Reading
from circuits.worldmodels.verdict import informative_probes, informative_scores

READINGS = "readings.json"
UNTRAINED, TOLD = "random-init", "state"
"""The objectives of the runs, of each cell, that scores stand between: 0 and 1."""
PLANTED = "legal-set (planted-heuristic)"
"""The objective of the run that plays by a rule of legality: probes that take it for the told one say nothing."""
CONTROLS = (UNTRAINED, TOLD, PLANTED)

NUMBERS: dict[str, tuple[str, str]] = {
    "d_ib_same_legal": ("inductive-bias", "d_ib_same_legal"),
    "d_ib_other_legal": ("inductive-bias", "d_ib_other_legal"),
    "d_ib_ceiling": ("inductive-bias", "ceiling"),
    "r_ib": ("inductive-bias", "r_ib"),
    "exact_legal_set": ("legal-actions", "value"),
    "top_legal": ("legal-actions", "top_legal"),
    "off_policy_gap": ("fan-out", "off_policy_gap"),
    "distinction_recall": ("myhill-nerode", "distinction_recall"),
    "distinction_precision": ("myhill-nerode", "distinction_precision"),
}
"""Columns of the results that are one number of a probe, besides those that are named like probes and scores."""


def column(name: str) -> str:
    """Return a probe's or score's name as a column's."""
    return name.replace("-", "_").replace(" ", "_")


GAME_COLUMNS = (
    *NUMBERS,
    *(column(probe) for probe in worldmodels.PROBES),
    *(f"{column(probe)}_{end}" for probe in worldmodels.PROBES for end in ("low", "high")),
    *(f"score_{column(score)}{end}" for score in worldmodels.SCORES for end in ("", "_low", "_high")),
    "state_probe_over_untrained",
    "agreement",
    "labels",
    "labels_total",
    "state_overlap",
    "exact_legal_set_unseen",
)
"""Columns that runs on games have, all of them numbers."""


@dataclass(frozen=True)
class GameAnalysis:
    """What was found out about one run on a game."""

    readings: dict[str, Reading]
    training: dict[str, list[Any]]

    @staticmethod
    def load(folder: Path, manifest: Mapping[str, Any]) -> GameAnalysis:
        """Return the analysis that ``analyse_game`` wrote into a folder.

        Raises:
            CorruptRun: a file of it is missing or altered.
        """
        for name in (READINGS, "figures.json"):
            if sha256_file(folder / name) != manifest["files"].get(name):
                raise CorruptRun(f"{folder / name} was altered: delete {folder} and run the study again")
        try:
            readings = from_json(dict[str, Reading], read_json(folder / READINGS))
        except BadInput as error:
            raise CorruptRun(f"{folder / READINGS} holds no readings ({error}): delete it and run again") from error
        return GameAnalysis(readings, read_json(folder / "figures.json")["training"])


def analyse_game(run: Run, game: Game, folder: Path) -> None:
    """Write what every probe reads of a run's model, and its training curves, into a folder."""
    readings = worldmodels.measure(run.model, game, policy=policy_of(run.recipe.stages[0], game))
    write_json(folder / READINGS, to_json(readings))
    write_json(folder / "figures.json", {"training": training_curves(run.metrics)})


def assessments(runs: Sequence[Planned], analyses: Mapping[str, GameAnalysis]) -> dict[str, Assessment]:
    """Return the verdict on each run that is analysed, by its id, between the controls of its cell over all seeds.

    A control that is not there, yet or at all, is replaced by what ``worldmodels.judge`` takes for it. What a probe
    says of the controls, and with it whether it says anything on a game, is one thing for all runs of a cell.
    """
    cells = {cell: _controls(cell, runs, analyses) for cell in dict.fromkeys(run.cell for run in runs)}
    said = {cell: informative_scores(*(list(by_id.values()) for by_id in found)) for cell, found in cells.items()}
    verdicts = {}
    for run in runs:
        if run.id not in analyses:
            continue
        untrained, told, planted = (_but(run.id, by_id) for by_id in cells[run.cell])
        how = [
            f"0: {UNTRAINED}, {len(untrained)} seeds" if untrained else "0: a statistic of 0",
            f"1: {TOLD}, {len(told)} seeds" if told else "1: a statistic of 1",
            *([f"told from {PLANTED}, {len(planted)} seeds"] if planted else []),
        ]
        verdicts[run.id] = worldmodels.judge(
            analyses[run.id].readings,
            untrained,
            told,
            planted,
            informative=said[run.cell],
            controls="; ".join(how),
        )
    return verdicts


def uninformative_probes(cell: str, runs: Sequence[Planned], analyses: Mapping[str, GameAnalysis]) -> tuple[str, ...]:
    """Return the probes that cannot tell the controls of a cell apart, and so say nothing on its game."""
    untrained, told, planted = (list(by_id.values()) for by_id in _controls(cell, runs, analyses))
    said = informative_probes(untrained, told, planted, list(worldmodels.PROBES))
    return tuple(probe for probe in worldmodels.PROBES if probe not in said)


def _controls(
    cell: str, runs: Sequence[Planned], analyses: Mapping[str, GameAnalysis]
) -> list[dict[str, dict[str, Reading]]]:
    """What is known of each of ``CONTROLS`` in a cell, by run."""
    of_cell = [run for run in runs if run.cell == cell and run.id in analyses]
    # by all of its stages, of which a control that is distilled to the last case has two
    trained = {run.id: set(run.objective.split(" + ")) for run in of_cell}
    return [{run.id: analyses[run.id].readings for run in of_cell if trained[run.id] == {name}} for name in CONTROLS]


def _but(run_id: str, by_id: Mapping[str, dict[str, Reading]]) -> list[dict[str, Reading]]:
    """A control's readings for a run: it is held to the others of its kind, where there are others."""
    return [readings for other, readings in by_id.items() if other != run_id] or list(by_id.values())


def game_columns(analysis: GameAnalysis, verdict: Assessment) -> dict[str, Any]:
    """Return what a verdict on a game adds to a run's row."""
    readings, training = analysis.readings, analysis.training
    row: dict[str, Any] = {"label": verdict.label, "accuracy": training["accuracy_random"][-1]}
    row["accuracy_train"] = training["accuracy_train"][-1]
    numbers = {name: readings[probe].number(key) for name, (probe, key) in NUMBERS.items()}
    numbers |= {column(name): reading.value for name, reading in readings.items()}
    for name, reading in readings.items():
        numbers[f"{column(name)}_low"], numbers[f"{column(name)}_high"] = reading.interval
    for name, score in verdict.scores.items():
        numbers[f"score_{column(name)}"] = score.value
        numbers[f"score_{column(name)}_low"], numbers[f"score_{column(name)}_high"] = score.low, score.high
    encoded = verdict.scores["encodes the state"]
    # selectivity: what can be read beyond what can be read of an untrained network of the same cell
    numbers["state_probe_over_untrained"] = encoded.raw - encoded.untrained
    numbers["state_overlap"] = training["state_overlap"][-1]
    numbers["labels"] = _labels(training, "labels")
    numbers["labels_total"] = numbers["labels"] + _labels(training, "labels_beside")
    # of a network that is trained on a planted rule: how often it takes the rule's moves for legal, at the end
    numbers["agreement"] = _last(training.get("agreement", ()))
    numbers["exact_legal_set_unseen"] = training["exact_legal_set"][-1]
    # NaN is what a probe could not measure, and NA in the table
    return row | {name: value for name, value in numbers.items() if value == value}


def _labels(training: Mapping[str, Sequence[Any]], name: str) -> float:
    """About how many labels a run was given: those of the update before each evaluation, for every update since."""
    steps = [0, *training["step"]]
    logged = enumerate(training.get(name, ()))
    return sum((steps[i + 1] - steps[i]) * float(labels) for i, labels in logged if labels is not None)


def _last(values: Sequence[Any]) -> float:
    known = [float(value) for value in values if value is not None]
    return known[-1] if known else float("nan")
