"""Accuracy by greedy decoding of the whole completion, judged by the task's strict verifier."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.model import Transformer
from circuits.objectives.base import answer_logits, has_one_token_answers, remember
from circuits.tasks.base import SPLITS, Batch, Role, Task


@remember
def _examples(task: Task, split: str, limit: int) -> Batch:
    size = task.split_size(split)
    return task.examples(split, limit=min(limit, size), seed=0)


def right(model: Transformer, task: Task, batch: Batch) -> Bool[Tensor, " batch"]:
    """Return whether each example's completion, decoded greedily, is right."""
    device = next(model.parameters()).device
    tokens = batch.tokens.to(device).clone()
    first = int((task.roles == Role.PROMPT).sum())
    with torch.no_grad():
        if has_one_token_answers(task):
            return answer_logits(model, tokens[:, :-1]).argmax(-1) == tokens[:, -1]
        for position in range(first, tokens.shape[1]):
            tokens[:, position] = answer_logits(model, tokens[:, :position]).argmax(-1)
    return task.verify(tokens)


def accuracy(model: Transformer, task: Task, split: str, *, limit: int = 4096) -> float:
    """Return the share of a split's examples (at most ``limit`` of them) whose whole completion is right.

    Raises:
        BadInput: the task has no such split.
    """
    return float(right(model, task, _examples(task, split, limit)).float().mean())


def accuracies(model: Transformer, task: Task, *, limit: int | None = None) -> dict[str, float]:
    """Return ``accuracy_train``, ``accuracy_random`` and ``accuracy_block``, those whose split is not empty.

    Args:
        model: what is evaluated.
        task: where the examples come from.
        limit: examples per split; None: few enough that forty evaluations cost a tenth of a training, 1024 where an
            answer is one token and 256 where it is decoded token by token.
    """
    limit = limit or (1024 if has_one_token_answers(task) else 256)
    return {
        f"accuracy_{split}": accuracy(model, task, split, limit=limit) for split in SPLITS if task.split_size(split)
    }
