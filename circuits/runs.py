"""A run: the directory that a training leaves behind, and what can be read back from it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from circuits import __version__
from circuits._io import (
    config_id,
    file_size,
    from_json,
    is_file,
    parse_json,
    read_bytes,
    read_json,
    sha256_file,
    to_json,
    write_json,
)
from circuits.errors import BadInput, CorruptRun, Diverged, IncompatibleRun, UnknownName
from circuits.model import ModelConfig, Transformer, load
from circuits.objectives.recipe import Recipe
from circuits.tasks import TASKS
from circuits.tasks.base import Task
from circuits.tasks.games import GAMES, Game

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FORMAT = 1
CHECKPOINT = r"checkpoints/step-\d+\.safetensors"
"""What a checkpoint's file is called below the run's directory."""


def _tasks_and_games() -> Mapping[str, type]:
    return {**TASKS, **GAMES}


@dataclass(frozen=True)
class RunConfig:
    """What a run is known by: the same config gives the same weights, unless a stage has a ``stop_accuracy``.

    Such a stage ends at an evaluation, so there the weights also depend on the ``evaluate_every`` of ``train``, which
    is no part of the config.
    """

    task: Annotated[Task | Game, _tasks_and_games]
    recipe: Recipe
    seed: int
    model: ModelConfig


def run_id(task: Task | Game, recipe: Recipe, seed: int, model: ModelConfig) -> str:
    """Return the run's ID: 12 hexadecimal digits of the sha256 of its canonical config."""
    return config_id(RunConfig(task, recipe, seed, model))


@dataclass(frozen=True)
class Run:
    """A finished run's directory. ``Run.load`` is the way in: it refuses what is unfinished or altered."""

    path: Path
    config: RunConfig
    manifest: Mapping[str, Any]

    @staticmethod
    def load(path: Path | str) -> Run:
        """Return the run in a directory, after checking the size of every file of it.

        Raises:
            BadInput: the directory holds no run.
            CorruptRun: it is unfinished, or a file is missing, truncated or altered.
            IncompatibleRun: another format version wrote it, or its task or objective is in no table here.
            StorageError: the directory may not be searched.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        file = folder / "config.json"
        data = parse_json(read_bytes(file, sha256=manifest["files"]["config.json"]["sha256"]), file)
        try:
            config = from_json(RunConfig, data)
        except BadInput as error:
            own = "; one of your own must stand in TASKS or OBJECTIVES first" if isinstance(error, UnknownName) else ""
            raise IncompatibleRun(f"{file}: {error}{own}") from error
        return Run(folder, config, manifest)

    @property
    def id(self) -> str:
        """12 hexadecimal digits of the sha256 of the canonical config."""
        return str(self.manifest["id"])

    @property
    def task(self) -> Task | Game:
        """The task that the run was trained on."""
        return self.config.task

    @property
    def recipe(self) -> Recipe:
        """What it was trained by."""
        return self.config.recipe

    @property
    def seed(self) -> int:
        """Seed of initial weights, data order and draws."""
        return self.config.seed

    @functools.cached_property
    def model(self) -> Transformer:
        """The model at the end of training, in eval mode, loaded and checked when first asked for.

        Raises:
            CorruptRun: the file was altered.
            Diverged: training ended with numbers that are not finite; ``checkpoint`` still gives what it kept before.
        """
        if self.manifest["status"] == "diverged":
            raise Diverged(f"{self.path} holds a run that diverged {self.divergence}: change its recipe or seed")
        return self.checkpoint(max(self.checkpoints))

    @property
    def divergence(self) -> str:
        """Where a run that diverged did so, and what is left of it."""
        last = f"its last good checkpoint is of step {max(self.checkpoints)}" if self.checkpoints else "it kept none"
        return f"at step {self.manifest.get('step')} ({last})"

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Checkpoint files by step."""
        names = [name for name in self.manifest["files"] if name.startswith("checkpoints/")]
        return {int(Path(name).stem.removeprefix("step-")): self.path / name for name in sorted(names)}

    def checkpoint(self, step: int) -> Transformer:
        """Return the model as it was after a step.

        Raises:
            BadInput: there is no checkpoint of that step.
            CorruptRun: the file was altered.
        """
        if step not in self.checkpoints:
            raise BadInput(f"no checkpoint of step {step}: there are {', '.join(map(str, self.checkpoints))}")
        file = self.checkpoints[step]
        entry = self.manifest["files"][file.relative_to(self.path).as_posix()]
        return load(file, sha256=entry["sha256"]).eval()

    @functools.cached_property
    def metrics(self) -> pd.DataFrame:
        """What was logged, one row per evaluation.

        Raises:
            CorruptRun: the file was altered.
        """
        import pandas as pd

        file = self.path / "metrics.jsonl"
        data = read_bytes(file, sha256=self.manifest["files"]["metrics.jsonl"]["sha256"])
        return pd.DataFrame([parse_json(line, file) for line in data.splitlines()])

    def figure(self) -> go.Figure:
        """Return the training curves: accuracy on each split by step."""
        import plotly.graph_objects as go

        from circuits._style import SPLIT_COLOURS

        names = {"train": "trained pairs", "random": "unseen, at random", "block": "unseen block"}
        lines = [
            go.Scatter(
                x=self.metrics["step"],
                y=self.metrics[f"accuracy_{split}"],
                name=name,
                mode="lines",
                line_color=SPLIT_COLOURS[split],
            )
            for split, name in names.items()
            if f"accuracy_{split}" in self.metrics
        ]
        figure = go.Figure(lines)
        figure.update_layout(
            title=f"{self.task.name}, {self.recipe.name}, seed {self.seed}",
            xaxis_title="training step",
            yaxis={"title": "accuracy (share)", "range": [-0.02, 1.02]},
            template="circuits",
        )
        return figure

    def _repr_html_(self) -> str:
        from html import escape

        last = self.metrics.iloc[-1].to_dict() if len(self.metrics) else {}
        numbers = ", ".join(f"{k} {v:.3g}" for k, v in last.items() if isinstance(v, (int, float)))
        if self.manifest["status"] == "diverged":
            numbers = f"diverged {self.divergence} {numbers}"
        return f"<b>{escape(self.task.name)}</b>, {escape(self.recipe.name)}, seed {self.seed}<br>{escape(numbers)}"


def list_runs(folder: Path | str) -> list[Run]:
    """Return the finished runs in the subdirectories of a folder, by name."""
    return [Run.load(path.parent) for path in sorted(Path(folder).glob("*/manifest.json"))]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a finished run, after checking the size of every file that it lists.

    Raises:
        BadInput: the directory holds no run.
        CorruptRun: the run is unfinished, the manifest is damaged, or a file is missing or of another size.
        IncompatibleRun: another format version wrote it.
        StorageError: the directory may not be searched.
    """
    path = folder / "manifest.json"
    if not is_file(path):
        if is_file(folder / "config.json"):
            raise CorruptRun(f"{folder} holds an unfinished run (no manifest.json): train it again with resume")
        raise BadInput(f"{folder} is not a run: it has no manifest.json; expected a directory given to train's out")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not {"format", "files", "id"} <= manifest.keys():
        raise CorruptRun(f"{path} is no manifest of a run: train it again")
    if manifest["format"] != FORMAT:
        raise IncompatibleRun(
            f"{folder} was written in run format {manifest['format']}, this version reads {FORMAT}: "
            "use the version of circuits that wrote it, or train it again"
        )
    _check_files(path, manifest)
    for name, entry in manifest["files"].items():
        if file_size(folder / name) != entry["size"]:
            raise CorruptRun(f"{folder / name} is missing or has the wrong size: train the run again")
    return manifest


def _check_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Return nothing.

    Raises:
        CorruptRun: the manifest says not how the run ended, or not the size and hash of every file that a run has.
    """
    files = manifest["files"]
    if not isinstance(files, dict) or not {"config.json", "metrics.jsonl"} <= files.keys():
        raise CorruptRun(f"{path} does not list the run's files: train it again")
    for name, entry in files.items():
        facts = entry if isinstance(entry, dict) else {}
        known = type(facts.get("size")) is int and re.fullmatch(r"[0-9a-f]{64}", str(facts.get("sha256")))
        expected = name in ("config.json", "metrics.jsonl") or re.fullmatch(CHECKPOINT, name)
        if not known or not expected:
            raise CorruptRun(f"{path} does not list the run's files with size and sha256 ({name}): train it again")
    if manifest.get("status") not in ("done", "diverged"):
        raise CorruptRun(f"{path}: status {manifest.get('status')!r}: expected 'done' or 'diverged': train it again")
    # a run may diverge before it keeps anything; one that is done has kept its end
    if manifest["status"] == "done" and not any(name.startswith("checkpoints/") for name in files):
        raise CorruptRun(f"{path} lists no checkpoint: train the run again")


def write_config(folder: Path, config: RunConfig) -> None:
    """Write ``config.json``."""
    write_json(folder / "config.json", to_json(config))


def write_manifest(folder: Path, config: RunConfig, *, status: str, **values: Any) -> dict[str, Any]:
    """Write the manifest, last of all, and return it: size and sha256 of every file, and what the run was made with."""
    files = [
        folder / "config.json",
        folder / "metrics.jsonl",
        *sorted((folder / "checkpoints").glob("step-*.safetensors")),
    ]
    entries = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": sha256_file(file)}
        for file in files
    }
    manifest = {
        "format": FORMAT,
        "id": config_id(config),
        "status": status,
        **values,
        "versions": versions(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "commit": git_commit(),
        "files": entries,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions that numbers may depend on: this package's, Python's and those of what computes."""
    others = {name: importlib.metadata.version(name) for name in ("transformer-lens", "numpy", "scipy", "scikit-learn")}
    return {"circuits": __version__, "torch": torch.__version__, "python": platform.python_version(), **others}


@functools.cache
def git_commit() -> str | None:
    """Return the commit of the source tree that this package is run from, None where it is installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
            timeout=5,
            env=os.environ,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
