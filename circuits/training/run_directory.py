"""Drains the generator of steps into a run directory that survives a crash at any moment."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from circuits import objectives
from circuits._io import (
    atomic_write,
    is_file,
    make_directory,
    parse_json,
    read_bytes,
    read_json,
    storage_errors,
    to_json,
)
from circuits.errors import BadInput, CorruptRun, Diverged, IncompatibleRun
from circuits.model import ModelConfig, Transformer, save
from circuits.objectives import Objective, Recipe
from circuits.runs import Run, RunConfig, read_manifest, write_config, write_manifest
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.base import Task
from circuits.tasks.games import Game
from circuits.training.defaults import LAST_SEED, check_fits, default_model, default_recipe
from circuits.training.loop import Position, Step, steps

STATE = "state.safetensors"
FIRST_REACHING = (0.5, 0.9, 0.97, 0.99)
"""A checkpoint is kept when the accuracy on unseen random pairs first reaches each of these."""


def train(
    task: Task | Game,
    recipe: str | Objective | Recipe,
    *,
    seed: int = 0,
    out: Path | str,
    model: ModelConfig | None = None,
    checkpoints: Sequence[int] = (),
    first_reaching: Sequence[float] = FIRST_REACHING,
    evaluate_every: int | None = None,
    save_every: float = 20.0,
    resume: bool = False,
    progress: bool = True,
) -> Run:
    """Return the finished run; one that ``out`` holds already, with the same config, is returned at once.

    Args:
        task: what to learn.
        recipe: a recipe, an objective, or an objective's name (then with ``default_recipe``).
        seed: seed of initial weights, data order and draws; the first two do not depend on the objective.
        out: the run's directory.
        model: the model's shape; None: ``default_model(task)``.
        checkpoints: steps after which to keep the model, besides the last and those of ``first_reaching``.
        first_reaching: accuracies on unseen random pairs at whose first evaluation to keep the model.
        evaluate_every: updates between evaluations; None: about forty over the recipe. A stage with a
            ``stop_accuracy`` ends at one of them, so with such a stage the weights depend on it.
        save_every: seconds between the states that ``resume`` goes on from.
        resume: go on from an unfinished run in ``out``, bit for bit as if it had not stopped.
        progress: show a progress bar.

    Raises:
        BadInput: an objective is undefined for the task, the model does not fit it, or ``out`` holds a run of this
            configuration that was stopped and ``resume`` is not asked for.
        IncompatibleRun: ``out`` holds a run of another configuration, or one that is past these checkpoints without
            having kept them.
        Diverged: a loss is not finite; step and last good checkpoint are named.
        StorageError: ``out`` cannot be written.
    """
    if isinstance(recipe, str):
        recipe = objectives.get(recipe)
    if not isinstance(recipe, Recipe):
        recipe = default_recipe(task, recipe)
    recipe.check(task)
    config = RunConfig(task, recipe, seed, model or default_model(task))
    check_fits(task, config.model)
    _check_run(recipe, seed, checkpoints, evaluate_every)
    folder = Path(out)
    if (done := _already(folder, config)) is not None:
        return _with_checkpoints(done, checkpoints)
    network, position, moments = _begin(folder, config, checkpoints, resume=resume)
    stream = steps(network, task, recipe, seed=seed, evaluate_every=evaluate_every, start=(position, moments))
    keeper = _Keeper(folder, recipe, position, checkpoints, first_reaching, save_every)
    started = time.monotonic()
    try:
        keeper.drain(network, stream, show=progress)
    except Diverged as error:
        step = keeper.position.step + 1
        last = max((folder / "checkpoints").glob("step-*.safetensors"), key=_step, default=None)
        where = f"last good checkpoint: {last}" if last else "no checkpoint was kept yet"
        write_manifest(folder, config, status="diverged", step=step)
        raise Diverged(f"training diverged at step {step}: {error}; {where}") from error
    except Exception:
        if keeper.position.step == 0:
            # the first update was refused, so nothing is lost where a corrected command takes the folder
            with contextlib.suppress(OSError):
                (folder / "config.json").unlink(missing_ok=True)
        raise
    step = keeper.position.step
    save(network, _checkpoint(folder, step))
    manifest = write_manifest(folder, config, status="done", steps=step, seconds=time.monotonic() - started)
    with storage_errors(folder):
        (folder / STATE).unlink(missing_ok=True)
    # not loaded from disk: a task or an objective of the caller's own need not be in the tables that loading reads
    return Run(folder, config, manifest)


class _Keeper:
    """Writes what a run keeps while it trains: metrics, checkpoints, and the state that it can go on from."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        position: Position,
        checkpoints: Sequence[int],
        first_reaching: Sequence[float],
        save_every: float,
    ) -> None:
        self.folder, self.recipe, self.position = folder, recipe, position
        self.checkpoints = frozenset(checkpoints)
        best = _best_accuracy(folder)
        self.goals = {float(goal) for goal in first_reaching if goal > best}
        self.save_every, self.saved = save_every, time.monotonic()

    def drain(self, network: Transformer, stream: Iterator[Step], *, show: bool) -> None:
        """Train to the end of a stream of updates.

        Raises:
            Diverged: a loss or a weight is not finite.
        """
        with _bar(self.recipe.steps, self.position.step, show=show) as bar:
            for update in stream:
                self.follow(network, update)
                bar.update(1)
                if update.evaluated:
                    bar.set_postfix(loss=f"{update.loss:.3g}", accuracy=f"{update.metrics['accuracy_random']:.3f}")

    def follow(self, network: Transformer, update: Step) -> None:
        """Keep what is due after an update.

        Raises:
            Diverged: something is due, and a weight is not finite: nothing is written then.
        """
        late = time.monotonic() - self.saved > self.save_every
        if update.evaluated or update.step in self.checkpoints or late:
            _check_finite(network)
        self._count(update)
        reached: set[float] = set()
        if update.evaluated:
            record = {"step": update.step, "stage": update.stage, "loss": update.loss, **update.metrics}
            with storage_errors(self.folder), (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
            reached = {goal for goal in self.goals if update.metrics["accuracy_random"] >= goal}
            self.goals -= reached
        if reached or update.step in self.checkpoints:
            save(network, _checkpoint(self.folder, update.step))
        if late:
            save_state(self.folder, network, update.optimizer, self.position, update.head)
            self.saved = time.monotonic()

    def _count(self, update: Step) -> None:
        old = self.position
        same = update.stage == old.stage
        streak = old.streak if same else 0
        goal = self.recipe.stages[update.stage].stop_accuracy
        if update.evaluated:
            streak = streak + 1 if goal is not None and update.metrics["accuracy_random"] >= goal else 0
        self.position = Position(update.step, update.stage, old.in_stage + 1 if same else 1, streak)


def _check_finite(network: Transformer) -> None:
    bad = [name for name, weight in network.named_parameters() if not bool(torch.isfinite(weight).all())]
    if bad:
        raise Diverged(f"{bad[0]} is not finite after the update: lower the learning rate or the weight decay")


def _check_run(recipe: Recipe, seed: int, checkpoints: Sequence[int], evaluate_every: int | None) -> None:
    check_integer("seed", seed, 0, LAST_SEED)
    if evaluate_every is not None:
        check_integer("evaluate_every", evaluate_every, 1, 2**31)
    for step in checkpoints:
        check_integer("a step of checkpoints", step, 1, recipe.steps, "the recipe has no more")


def _with_checkpoints(run: Run, checkpoints: Sequence[int]) -> Run:
    """The finished run, if it kept what is asked for."""
    missing = [step for step in checkpoints if step not in run.checkpoints and step <= max(run.checkpoints)]
    if missing:
        raise IncompatibleRun(
            f"{run.path} is finished and kept no checkpoint of step {missing[0]}: choose another output directory"
        )
    return run


def _already(folder: Path, config: RunConfig) -> Run | None:
    """The finished run of this config in a folder, None where there is none or it is unfinished."""
    found = folder / "config.json"
    if is_file(found) and read_json(found) != to_json(config):
        raise IncompatibleRun(f"{folder} holds a run of another configuration: choose another output directory")
    if not is_file(folder / "manifest.json"):
        return None
    run = Run(folder, config, read_manifest(folder))
    if run.manifest["status"] == "diverged":
        raise Diverged(f"{folder} holds a run that diverged {run.divergence}: change its recipe or seed")
    return run


def _begin(
    folder: Path, config: RunConfig, checkpoints: Sequence[int], *, resume: bool
) -> tuple[Transformer, Position, dict[str, Any] | None]:
    """The model, position and optimiser state to start from; clears what an earlier attempt left behind it."""
    start: tuple[Transformer, Position, dict[str, Any] | None]
    # Whatever may refuse comes before the config is written, by which the folder belongs to this run alone.
    going_on = is_file(folder / "config.json") and is_file(folder / STATE)
    if going_on and not resume:
        raise BadInput(
            f"{folder} holds a run of this configuration that was stopped: go on with resume (--resume), or delete it"
        )
    start = load_state(folder) if going_on else (Transformer(config.model, seed=config.seed), Position(), None)
    position = start[1]
    log = _logged(folder) if going_on else []
    for wanted in checkpoints:
        if wanted <= position.step and not is_file(_checkpoint(folder, wanted)):
            raise IncompatibleRun(
                f"{folder} stopped after step {position.step} and kept no checkpoint of step {wanted}: delete it and "
                "train again, or leave this checkpoint out"
            )
    make_directory(folder / "checkpoints")
    with storage_errors(folder):
        if not going_on:
            # a state of an attempt that this one replaces must not be what a later resume goes on from
            (folder / STATE).unlink(missing_ok=True)
        write_config(folder, config)
        for file in (folder / "checkpoints").glob("step-*.safetensors"):
            if _step(file) > position.step:
                file.unlink()
        kept = [line for line, record in log if record["step"] <= position.step]
        atomic_write(folder / "metrics.jsonl", b"".join(kept))
        if position.step == 0:
            shutil.rmtree(folder / "analysis", ignore_errors=not (folder / "analysis").exists())
    return start


def _best_accuracy(folder: Path) -> float:
    """The best accuracy logged so far, so that a resumed run does not keep a first reaching twice."""
    return max((record["accuracy_random"] for _, record in _logged(folder)), default=-1.0)


def _logged(folder: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The whole lines of an unfinished run's log with their records; a last line cut short was being written.

    Raises:
        CorruptRun: a whole line is no record.
    """
    log = folder / "metrics.jsonl"
    lines = read_bytes(log).splitlines(keepends=True) if is_file(log) else []
    records = [(line, parse_json(line, log)) for line in lines if line.endswith(b"\n")]
    for _, record in records:
        if not isinstance(record, dict) or not {"step", "accuracy_random"} <= record.keys():
            raise CorruptRun(f"{log} is damaged: delete {folder} and train again")
    return records


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:06d}.safetensors"


def save_state(
    folder: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    position: Position,
    head: torch.nn.Module | None = None,
) -> None:
    """Write all that a run needs to go on bit for bit: weights, a head's too, moments and position, as one file."""
    state = optimizer.state_dict()
    tensors = {f"model.{name}": value.detach().contiguous() for name, value in model.state_dict().items()}
    if head is not None:
        tensors |= {f"head.{name}": value.detach().contiguous() for name, value in head.state_dict().items()}
    plain: dict[str, dict[str, float]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value.detach().contiguous()
            else:
                plain.setdefault(str(index), {})[key] = value
    metadata = {
        "position": json.dumps(asdict(position)),
        "groups": json.dumps(state["param_groups"]),
        "plain": json.dumps(plain),
        "config": json.dumps(to_json(model.config)),
    }
    metadata["sha256"] = _digest(tensors, metadata)
    atomic_write(folder / STATE, safetensors.torch.save(tensors, metadata))


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """The sha256 of everything in a state but itself."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps({k: v for k, v in metadata.items() if k != "sha256"}, sort_keys=True).encode())
    return digest.hexdigest()


def load_state(folder: Path) -> tuple[Transformer, Position, dict[str, Any]]:
    """Return model, position and optimiser state, the head's weights as its entry ``head``, from ``save_state``.

    Raises:
        CorruptRun: the file is damaged or altered.
    """
    path = folder / STATE
    try:
        tensors = safetensors.torch.load(read_bytes(path))
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("sha256") != _digest(tensors, metadata):
            raise CorruptRun(f"{path} was altered: delete it and train again")
        config = ModelConfig(**json.loads(metadata["config"]))
        position = Position(**json.loads(metadata["position"]))
        groups, plain = json.loads(metadata["groups"]), json.loads(metadata["plain"])
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptRun(f"{path} is damaged ({error}): delete it and train again") from error
    model = Transformer(config)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    state: dict[int, dict[str, Any]] = {int(i): dict(entries) for i, entries in plain.items()}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    for group in groups:
        group["betas"] = tuple(group["betas"])
    head = {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")}
    return model, position, {"state": state, "param_groups": groups, "head": head}


def _bar(total: int, done: int, *, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=done, desc="train", unit="step", disable=not show)
