"""The model and the recipe that a task gets where the caller names none."""

from __future__ import annotations

import dataclasses

from circuits.model import ModelConfig
from circuits.objectives import Objective, Recipe, Stage
from circuits.objectives.base import has_one_token_answers
from circuits.tasks.base import Task


def default_model(task: Task) -> ModelConfig:
    """Return one layer without a norm for tasks with one-token answers, two layers with LayerNorm for digits."""
    small = ModelConfig(d_vocab=len(task.vocabulary), n_ctx=len(task.roles) - 1, d_model=64, n_heads=4, d_mlp=256)
    if has_one_token_answers(task):
        return small
    return dataclasses.replace(small, n_layers=2, normalization="LN")


def default_recipe(task: Task, objective: Objective) -> Recipe:
    """Return a one-stage recipe with settings that are known to train the task.

    Modular tasks: the whole table, learning rate 1e-2, weight decay 2 (grokking in some hundred steps). Plain addition:
    batches of 512, 5e-3, no weight decay, which hurts there. Digits: batches of 256, 3e-3.
    """
    if not has_one_token_answers(task):
        stage = Stage(objective, steps=700, batch_size=256, learning_rate=3e-3, warmup=50, cooldown=0.3)
    elif task.period is not None:
        stage = Stage(objective, steps=500, learning_rate=1e-2, weight_decay=2.0, cooldown=0.4)
    else:
        stage = Stage(objective, steps=2500, batch_size=512, learning_rate=5e-3, cooldown=0.3)
    return Recipe(objective.name, (stage,))
