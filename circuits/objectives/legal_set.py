"""The uniform distribution over all legal moves as the label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from circuits.errors import BadInput
from circuits.objectives.base import Loss, check_is_game, remember
from circuits.tasks.base import Task
from circuits.tasks.games import Game, GameBatch, Heuristic

if TYPE_CHECKING:
    from circuits.model import HookedModel

LABELS = ("rules", "planted-heuristic")


@remember
def _planted(game: Game) -> Heuristic:
    """The game's heuristic, kept because it may have tables of its own."""
    return game.planted_heuristic()


@dataclass(frozen=True)
class LegalSet:
    """Cross-entropy to the uniform distribution over all legal tokens, at every position.

    What next-token training on uniform play comes to in the limit, without the noise of the move that was drawn. With
    the labels of the game's planted heuristic in place of the rules it distils that heuristic into a network, as far
    as it goes (``agreement`` is logged): a model that plays by a rule of legality, whatever else it may hold.

    Attributes:
        labels: ``rules``, or ``planted-heuristic``: the tokens that the game's legality-only rule takes for legal.

    Source: the "probability distribution" objective of Balogh and Jelasity 2026 (arXiv 2602.05903): the divergence to
        the uniform distribution over the legal moves.
    """

    name: ClassVar[str] = "legal-set"

    labels: str = "rules"

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            raise BadInput(f"labels = {self.labels!r}: expected one of {', '.join(LABELS)}")

    def check(self, task: Task | Game) -> None:
        """Return nothing.

        Raises:
            BadInput: the task is no game.
        """
        check_is_game(self.name, task)

    def loss(self, model: HookedModel, task: Game, batch: GameBatch, *, generator: torch.Generator) -> Loss:
        """Return the mean cross-entropy over the positions that count; logs where the sets of likely tokens agree.

        A token is likely that has more than half of the probability of an even split over the labels.
        """
        legal = batch.legal
        if self.labels == "planted-heuristic":
            legal = _planted(task)(batch.inputs)[:, 1:]
        targets = legal[batch.scored].float()
        logits = model(batch.inputs)[batch.scored][:, : targets.shape[1]]
        sizes = targets.sum(1, keepdim=True).clamp_min(1)
        agreement = ((logits.detach().softmax(1) > 0.5 / sizes) == targets.bool()).all(1).float().mean()
        metrics: dict[str, torch.Tensor | float] = {"labels": float(targets.numel()), "agreement": agreement}
        return Loss(F.cross_entropy(logits, targets / sizes), metrics)
