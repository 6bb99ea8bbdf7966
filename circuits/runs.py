"""A run: the directory that a training leaves behind, and what can be read back from it."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from circuits import __version__
from circuits._io import config_id, from_json, parse_json, read_bytes, read_json, sha256_file, to_json, write_json
from circuits.errors import BadInput, CorruptRun, IncompatibleRun
from circuits.model import ModelConfig, Transformer, load
from circuits.objectives.recipe import Recipe
from circuits.tasks import TASKS
from circuits.tasks.base import Task

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FORMAT = 1


@dataclass(frozen=True)
class RunConfig:
    """All that determines a run: the same config gives the same weights."""

    task: Annotated[Task, TASKS]
    recipe: Recipe
    seed: int
    model: ModelConfig


def run_id(task: Task, recipe: Recipe, seed: int, model: ModelConfig) -> str:
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
            IncompatibleRun: another format version wrote it.
        """
        folder = Path(path)
        if not (folder / "manifest.json").is_file():
            unfinished = (folder / "config.json").is_file()
            if unfinished:
                raise CorruptRun(f"{folder} holds an unfinished run (no manifest.json): train it again with resume")
            raise BadInput(f"{folder} is not a run: it has no manifest.json; expected a directory given to train's out")
        manifest = read_json(folder / "manifest.json")
        if not isinstance(manifest, dict) or not {"format", "files", "id"} <= manifest.keys():
            raise CorruptRun(f"{folder / 'manifest.json'} is no manifest of a run: train it again")
        if manifest["format"] != FORMAT:
            raise IncompatibleRun(
                f"{folder} was written in run format {manifest['format']}, this version reads {FORMAT}: "
                "use the version of circuits that wrote it, or train it again"
            )
        try:
            sizes = {str(name): int(entry["size"]) for name, entry in manifest["files"].items()}
            digest = str(manifest["files"]["config.json"]["sha256"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptRun(f"{folder / 'manifest.json'} does not list the run's files: train it again") from error
        for name, size in sizes.items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size:
                raise CorruptRun(f"{file} is missing or has the wrong size: train the run again")
        data = parse_json(
            read_bytes(folder / "config.json", sha256=digest),
            folder / "config.json",
        )
        try:
            config = from_json(RunConfig, data)
        except BadInput as error:
            raise IncompatibleRun(f"{folder / 'config.json'}: {error}") from error
        return Run(folder, config, manifest)

    @property
    def id(self) -> str:
        """12 hexadecimal digits of the sha256 of the canonical config."""
        return str(self.manifest["id"])

    @property
    def task(self) -> Task:
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
        """The model at the end of training, in eval mode, loaded and checked when first asked for."""
        return self.checkpoint(max(self.checkpoints))

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

        from circuits import _style  # noqa: F401  registers the template

        names = {"accuracy_train": "train", "accuracy_random": "held out at random", "accuracy_block": "held-out block"}
        lines = [
            go.Scatter(x=self.metrics["step"], y=self.metrics[column], name=name, mode="lines")
            for column, name in names.items()
            if column in self.metrics
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

        last = self.metrics.iloc[-1].to_dict()
        numbers = ", ".join(f"{k} {v:.3g}" for k, v in last.items() if isinstance(v, (int, float)))
        return f"<b>{escape(self.task.name)}</b>, {escape(self.recipe.name)}, seed {self.seed}<br>{escape(numbers)}"


def list_runs(folder: Path | str) -> list[Run]:
    """Return the finished runs in the subdirectories of a folder, by name."""
    return [Run.load(path.parent) for path in sorted(Path(folder).glob("*/manifest.json"))]


def write_config(folder: Path, config: RunConfig) -> None:
    """Write ``config.json``."""
    write_json(folder / "config.json", to_json(config))


def write_manifest(folder: Path, config: RunConfig, *, status: str, **values: Any) -> None:
    """Write the manifest, last of all: size and sha256 of every file, and what the run was made with."""
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
        "versions": {"circuits": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "commit": git_commit(),
        "files": entries,
    }
    write_json(folder / "manifest.json", manifest)


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
