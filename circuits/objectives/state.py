"""The state itself as the label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from circuits.objectives.base import Loss, check_is_game, check_number
from circuits.objectives.heads import LinearHead, feature_losses, logits_and_residual, read_features
from circuits.objectives.next_token import next_token_loss
from circuits.tasks.base import Task
from circuits.tasks.games import Game, GameBatch

if TYPE_CHECKING:
    from circuits.model import HookedModel


@dataclass(frozen=True)
class State:
    """Cross-entropy on every feature of the state behind each prefix, beside that on next tokens (a joint state head).

    The positive control of world-model probes: a network trained by it is told the state, by one linear head, and
    plays. With a ``next_token`` of 0 nothing is said of moves, and the unembedding stays as it was; a stage of
    ``next-token`` that trains the unembedding alone then gives it a voice.

    Attributes:
        next_token: weight of the next tokens' cross-entropy.

    Source: the state target of keyonvafa/inductive-bias-probes (``predict_type: state``), features of the mover's view
        as in Nanda, Lee and Wattenberg 2023 (arXiv 2309.00941).
    """

    name: ClassVar[str] = "state"

    next_token: float = 1.0

    def __post_init__(self) -> None:
        check_number("next_token", self.next_token, 0)

    def check(self, task: Task | Game) -> None:
        """Return nothing.

        Raises:
            BadInput: the task is no game.
        """
        check_is_game(self.name, task)

    def head(self, task: Game, d_model: int, *, generator: torch.Generator) -> LinearHead:
        """Return the linear head, one output for each value of each feature."""
        return LinearHead(d_model, sum(task.feature_sizes), generator)

    def loss(
        self, model: HookedModel, task: Game, batch: GameBatch, *, generator: torch.Generator, head: LinearHead
    ) -> Loss:
        """Return the mean over the positions that count and over features; logs the share of states that are right."""
        next_logits, resid = logits_and_residual(model, batch.inputs)
        logits = head(resid[batch.scored])
        features = task.state_features(batch.states[batch.scored])
        right = (read_features(logits.detach(), task) == features).all(1).float().mean()
        metrics: dict[str, torch.Tensor | float] = {"labels": float(features.numel()), "head_accuracy": right}
        loss = feature_losses(logits, task, features).mean()
        if self.next_token:
            loss = loss + self.next_token * next_token_loss(next_logits, batch)
            metrics["labels_beside"] = float(batch.scored[:, :-1].sum())
        return Loss(loss, metrics)
