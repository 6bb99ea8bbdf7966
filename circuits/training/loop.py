"""The training loop: one generator of steps that reads top to bottom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuits.errors import BadInput, Diverged
from circuits.model import Transformer
from circuits.objectives import Recipe, Stage
from circuits.objectives.recipe import policy_of
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.base import Batch, Task
from circuits.tasks.games import Game, GameBatch, is_game, training_batch
from circuits.training.defaults import check_fits
from circuits.training.evaluate import accuracies

DATA_STREAM, DRAW_STREAM, HEAD_STREAM = 1, 2, 3


@dataclass(frozen=True, eq=False)
class Step:
    """One update: its number (from 1, over all stages), its loss in nats, and the evaluation if there was one."""

    step: int
    stage: int
    loss: float
    metrics: Mapping[str, float]
    optimizer: torch.optim.Optimizer
    head: torch.nn.Module | None = None
    """What the objective trains beside the model."""

    @property
    def evaluated(self) -> bool:
        """Whether accuracies were measured after this step."""
        return "accuracy_random" in self.metrics


@dataclass(frozen=True)
class Position:
    """Where a training stands: updates done in all, in this stage, the stage, and evaluations at the goal in a row."""

    step: int = 0
    stage: int = 0
    in_stage: int = 0
    streak: int = 0


def generator_for(seed: int, stream: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the generator of one step: streams of data and of draws are functions of (seed, step) alone.

    Data order is therefore the same whatever the objective draws, and resuming needs no generator state.
    """
    return torch.Generator(device).manual_seed((seed * 4 + stream) * 0x9E3779B1 % 2**40 + step * 0x100000001B3 % 2**61)


def learning_rate(stage: Stage, done: int) -> float:
    """Return the learning rate of the update after ``done`` updates: linear warm-up, plateau, cooldown at 0.3."""
    rate = stage.learning_rate * min(1.0, (done + 1) / max(stage.warmup, 1))
    return rate * 0.3 if done >= (1 - stage.cooldown) * stage.steps else rate


def make_optimizer(model: Transformer, stage: Stage, head: torch.nn.Module | None = None) -> torch.optim.AdamW:
    """Return AdamW with the stage's settings and fresh moments, over the weights that it trains and the head's."""
    fused = next(model.parameters()).device.type in ("cpu", "cuda")  # a tenth of a step of a small model on a CPU
    weights = list((model if stage.trained == "all" else model.unembed).parameters())
    return torch.optim.AdamW(
        weights + (list(head.parameters()) if head is not None else []),
        lr=stage.learning_rate,
        betas=stage.betas,
        weight_decay=stage.weight_decay,
        fused=fused,
    )


def make_head(model: Transformer, task: Task | Game, stage: Stage, seed: int) -> torch.nn.Module | None:
    """Return what the objective trains beside the model, with initial weights that are a function of the seed."""
    if not hasattr(stage.objective, "head"):
        return None
    head: torch.nn.Module | None = stage.objective.head(
        task, model.config.d_model, generator=generator_for(seed, HEAD_STREAM, 0)
    )
    return None if head is None else head.to(next(model.parameters()).device)


def steps(
    model: Transformer,
    task: Task | Game,
    recipe: Recipe,
    *,
    seed: int = 0,
    evaluate_every: int | None = None,
    start: tuple[Position, Mapping[str, Any] | None] | None = None,
) -> Iterator[Step]:
    """Yield one ``Step`` per update; stop looping and the model stays as it is.

    Args:
        model: trained in place.
        task: where batches come from.
        recipe: stages, each with fresh optimiser moments.
        seed: seed of data order and of what objectives draw.
        evaluate_every: updates between evaluations; None: about forty over the recipe. The last of a stage always is.
        start: position and optimiser state to go on from, as ``train`` keeps them.

    Raises:
        BadInput: an objective is undefined for the task, the model cannot read or say its tokens, or a stage trains an
            unembedding that is tied.
        Diverged: a loss is not finite; the model then holds the weights before that update.
    """
    recipe.check(task)
    check_fits(task, model.config)
    if model.config.tied and any(stage.trained == "unembedding" for stage in recipe.stages):
        raise BadInput("trained = 'unembedding', but the unembedding is tied to the embedding: leave tied out")
    if evaluate_every is not None:
        check_integer("evaluate_every", evaluate_every, 1, 2**31)
    device = next(model.parameters()).device
    every = evaluate_every or max(1, recipe.steps // 40)
    position, moments = start or (Position(), None)
    step = position.step
    model.train()
    for number in range(position.stage, len(recipe.stages)):
        stage = recipe.stages[number]
        head = make_head(model, task, stage, seed)
        optimizer = make_optimizer(model, stage, head)
        resumed = number == position.stage
        if resumed and moments is not None:
            optimizer.load_state_dict({key: moments[key] for key in ("state", "param_groups")})
            if head is not None:
                head.load_state_dict(moments["head"])
        streak = position.streak if resumed else 0
        if streak >= 2:
            continue  # the update that ended this stage was the last one kept
        whole = task.examples("train").to(device) if stage.batch_size is None and not is_game(task) else None
        for done in range(position.in_stage if resumed else 0, stage.steps):
            batch = whole if whole is not None else _draw(task, stage, seed, step).to(device)
            draws = generator_for(seed, DRAW_STREAM, step, device)
            with _others_frozen(model, stage):
                loss, logged = _update(model, task, stage, optimizer, head, batch, done, draws)
            step += 1
            last = done + 1 == stage.steps
            metrics: dict[str, float] = {}
            if step % every == 0 or last:
                metrics = {k: float(v) for k, v in logged.items()} | accuracies(
                    model.eval(), task, policy=policy_of(stage, task) if is_game(task) else None
                )
                model.train()
                at_goal = stage.stop_accuracy is not None and metrics["accuracy_random"] >= stage.stop_accuracy
                streak = streak + 1 if at_goal else 0
            yield Step(step, number, loss, metrics, optimizer, head)
            if streak >= 2:
                break
    model.eval()


@contextmanager
def _others_frozen(model: Transformer, stage: Stage) -> Iterator[None]:
    """Have no gradient computed that the stage does not use."""
    own = set(model.unembed.parameters()) if stage.trained == "unembedding" else set(model.parameters())
    others = [weight for weight in model.parameters() if weight.requires_grad and weight not in own]
    for weight in others:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in others:
            weight.requires_grad_(True)


def _draw(task: Task | Game, stage: Stage, seed: int, step: int) -> Batch | GameBatch:
    assert stage.batch_size is not None
    if is_game(task):
        return training_batch(task, policy_of(stage, task), stage.batch_size, seed=seed, step=step)
    return task.sample("train", stage.batch_size, generator=generator_for(seed, DATA_STREAM, step))


def _update(
    model: Transformer,
    task: Task | Game,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    head: torch.nn.Module | None,
    batch: Batch | GameBatch,
    done: int,
    generator: torch.Generator,
) -> tuple[float, Mapping[str, Tensor | float]]:
    """One update; returns the loss before it and what the objective logs.

    Raises:
        Diverged: the loss is not finite; nothing is updated then.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(stage, done)
    beside = {} if head is None else {"head": head}
    loss = stage.objective.loss(model, task, batch, generator=generator, **beside)
    value = float(loss.value.detach())
    if value != value or value in (float("inf"), float("-inf")):
        raise Diverged(f"the loss is {value}: lower the learning rate ({stage.learning_rate}) or clip the gradient")
    optimizer.zero_grad(set_to_none=True)
    loss.value.backward()
    if stage.gradient_clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.gradient_clip)
    optimizer.step()
    return value, loss.metrics
