"""The model and the recipe that a task gets where the caller names none, and whether a model of the caller's fits."""

from __future__ import annotations

import dataclasses

from circuits.errors import BadInput
from circuits.model import ModelConfig
from circuits.objectives import LegalSet, NextToken, Objective, Recipe, Stage
from circuits.objectives.base import has_one_token_answers, highest_completion_token
from circuits.tasks.base import Task
from circuits.tasks.games import Game, is_game

LAST_SEED = 2**32 - 1
"""The largest seed of a run, which is the largest that numpy takes too."""


def default_model(task: Task | Game) -> ModelConfig:
    """Return one layer without a norm for one-token answers, two layers with LayerNorm for digits and games."""
    if is_game(task):
        return ModelConfig(
            d_vocab=task.d_vocab,
            n_ctx=task.n_ctx,
            n_layers=2,
            d_model=64,
            n_heads=4,
            d_mlp=128,
            normalization="LN",
            unembed_bias=True,
        )
    small = ModelConfig(d_vocab=len(task.vocabulary), n_ctx=len(task.roles) - 1, d_model=64, n_heads=4, d_mlp=256)
    if has_one_token_answers(task):
        return small
    return dataclasses.replace(small, n_layers=2, normalization="LN")


def default_recipe(task: Task | Game, objective: Objective) -> Recipe:
    """Return a one-stage recipe with settings that are known to train the task.

    Modular tasks: the whole table, learning rate 1e-2, weight decay 2 (grokking in some hundred steps). Plain addition:
    batches of 512, 5e-3, no weight decay, which hurts there. Digits: batches of 256, 3e-3. Games: batches of 64
    sequences, 3e-3, and for an objective that says nothing of moves a stage that trains the unembedding alone on next
    tokens.
    """
    if is_game(task):
        stage = Stage(objective, steps=600, batch_size=64, learning_rate=3e-3, warmup=50, cooldown=0.3)
        if isinstance(objective, (NextToken, LegalSet)) or getattr(objective, "next_token", False):
            return Recipe(objective.name, (stage,))
        speak = Stage(NextToken(), steps=200, batch_size=64, learning_rate=1e-2, cooldown=0.3, trained="unembedding")
        return Recipe(objective.name, (stage, speak))
    if not has_one_token_answers(task):
        stage = Stage(objective, steps=700, batch_size=256, learning_rate=3e-3, warmup=50, cooldown=0.3)
    elif task.period is not None:
        stage = Stage(objective, steps=500, learning_rate=1e-2, weight_decay=2.0, cooldown=0.4)
    else:
        stage = Stage(objective, steps=2500, batch_size=512, learning_rate=5e-3, cooldown=0.3)
    return Recipe(objective.name, (stage,))


def check_fits(task: Task | Game, model: ModelConfig) -> None:
    """Return nothing.

    Raises:
        BadInput: the model cannot read the task's sequences, or not give its answers.
    """
    length = task.n_ctx
    if model.d_vocab < len(task.vocabulary):
        raise BadInput(f"d_vocab = {model.d_vocab}, but {task.name!r} has {len(task.vocabulary)} tokens: raise d_vocab")
    if model.n_ctx < length:
        raise BadInput(f"n_ctx = {model.n_ctx}, but {task.name!r} needs {length} positions: raise n_ctx")
    if is_game(task) and not model.causal:
        raise BadInput(f"causal = false, but each position of {task.name!r} is told from those before it: leave it out")
    highest = task.d_vocab - 1 if is_game(task) else highest_completion_token(task)
    if model.d_vocab_out is not None and model.d_vocab_out <= highest:
        raise BadInput(
            f"d_vocab_out = {model.d_vocab_out}, but completions of {task.name!r} go up to token {highest}: "
            "raise d_vocab_out"
        )
