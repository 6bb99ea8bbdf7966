"""What a sequence comes to in the end, as the label of every position: the objective ``value`` on games."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

from circuits.objectives.base import Loss
from circuits.objectives.heads import LinearHead, logits_and_residual
from circuits.tasks.games import Game, GameBatch

if TYPE_CHECKING:
    from circuits.model import HookedModel


def outcome_loss(model: HookedModel, game: Game, batch: GameBatch, head: LinearHead) -> Loss:
    """Return the mean cross-entropy of the outcome, at positions that count of sequences without a held-out state."""
    counts = batch.scored
    held = game.held()
    if held is not None:
        # what comes of a sequence through a held-out state is known from behind it
        counts = counts & ~held.visits(batch.games).any(1, keepdim=True)
    outcomes = game.outcome(batch.games.final_states)[:, None].expand_as(counts)[counts]
    logits = head(logits_and_residual(model, batch.inputs)[1][counts])
    if not len(outcomes):
        return Loss(logits.sum(), {"labels": 0.0, "head_accuracy": 0.0})
    right = (logits.detach().argmax(1) == outcomes).float().mean()
    return Loss(F.cross_entropy(logits, outcomes), {"labels": float(len(outcomes)), "head_accuracy": right})
