"""Accuracy: of whole completions, decoded greedily and judged by the task's strict verifier; of a game's next moves."""

from __future__ import annotations

import torch

from circuits._decoding import greedy_right
from circuits.model import Transformer
from circuits.objectives.base import has_one_token_answers, remember
from circuits.tasks.base import SPLITS, Batch, Task
from circuits.tasks.games import Game, evaluation_batch, is_game, overlap, training_batch
from circuits.tasks.games.automaton import automaton, reached_without

MANY = 64
"""Sequences of a batch, of 64 that are played together, that stand for all of training where states cannot be
listed."""


@remember
def _examples(task: Task, split: str, limit: int) -> Batch:
    size = task.split_size(split)
    return task.examples(split, limit=min(limit, size), seed=0)


def accuracy(model: Transformer, task: Task, split: str, *, limit: int = 4096) -> float:
    """Return the share of a split's examples (at most ``limit`` of them) whose whole completion is right.

    Raises:
        BadInput: the task has no such split.
    """
    return float(greedy_right(model, task, _examples(task, split, limit)).float().mean())


def accuracies(
    model: Transformer, task: Task | Game, *, limit: int | None = None, policy: str | None = None
) -> dict[str, float]:
    """Return ``accuracy_train``, ``accuracy_random`` and ``accuracy_block``, those whose split is not empty.

    Of a game, ``accuracy_train`` and ``accuracy_random`` are the shares of positions, as in training and behind
    held-out states, at which the most probable token is legal; see ``game_accuracies``.

    Args:
        model: what is evaluated.
        task: where the examples come from.
        limit: examples per split; None: few enough that forty evaluations cost a tenth of a training, 1024 where an
            answer is one token and 256 where it is decoded token by token.
        policy: of a game: who plays the sequences; None: uniform play.
    """
    if is_game(task):
        return game_accuracies(model, task, policy=policy or task.policies[0])
    limit = limit or (1024 if has_one_token_answers(task) else 256)
    return {
        f"accuracy_{split}": accuracy(model, task, split, limit=limit) for split in SPLITS if task.split_size(split)
    }


def game_accuracies(model: Transformer, game: Game, *, policy: str) -> dict[str, float]:
    """Return how a model plays, at positions as in training and at unseen ones.

    ``accuracy_train``, ``accuracy_random``: share of positions at which the most probable token is legal.
    ``exact_legal_set``: share of unseen positions at which exactly the legal tokens have more than half of the
    probability that each would have if all legal ones had the same. ``state_overlap``: share of the different states
    at unseen positions that positions in training can have, too: behind a held-out state come others that are not.
    """
    device = next(model.parameters()).device
    found: dict[str, float] = {}
    batches = [evaluation_batch(game, policy, unseen=unseen).to(device) for unseen in (False, True)]
    for name, batch in zip(("train", "random"), batches, strict=True):
        with torch.no_grad():
            probabilities = model(batch.inputs)[..., : game.d_vocab].softmax(-1)[batch.scored]
        legal = batch.legal[batch.scored]
        top = legal.gather(1, probabilities.argmax(1, keepdim=True))
        found[f"accuracy_{name}"] = float(top.float().mean())
        accepted = probabilities > 0.5 / legal.sum(1, keepdim=True)
        found["exact_legal_set"] = float((accepted == legal).all(1).float().mean())
    return found | {"state_overlap": _overlap(game, policy)}


@remember
def _overlap(game: Game, policy: str) -> float:
    """Share of the different states at unseen positions that a position in training can have too.

    Where states can be listed, those are all that play can reach without a held-out one; else those of some sequences.
    """
    unseen = evaluation_batch(game, policy, unseen=True)
    states = unseen.states[unseen.scored].unique(dim=0)
    held = game.held()
    if held is None:
        return 1.0
    if game.n_states is None:
        seen = training_batch(game, policy, MANY, seed=0, step=0)
        return overlap(seen, unseen).share
    table = automaton(game)
    trained = reached_without(table, held.contains(table.states))
    return float(trained[table.rows(game.state_id(states))].float().mean()) if len(states) else 0.0
