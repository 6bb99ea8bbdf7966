"""Cross-entropy on every next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuits.errors import BadInput
from circuits.objectives.base import Loss
from circuits.tasks.base import Batch, Task
from circuits.tasks.games import Game, GameBatch

if TYPE_CHECKING:
    from circuits.model import HookedModel


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy on every next token of a sequence, those of the prompt included.

    Mean over all targets of -log p(token | tokens before it). The prompt's own tokens cannot be foreseen where
    operands are drawn independently, so there the loss stays at their entropy. Of a game all moves after the first are
    targets, up to the one into a held-out state.

    Source: Radford et al. 2018, "Improving language understanding by generative pre-training", section 3.1.
    """

    name: ClassVar[str] = "next-token"

    def check(self, task: Task | Game) -> None:
        """Return nothing: every task has next tokens."""

    def loss(
        self, model: HookedModel, task: Task | Game, batch: Batch | GameBatch, *, generator: torch.Generator
    ) -> Loss:
        """Return the mean cross-entropy over every target of the batch.

        Raises:
            BadInput: the model's output vocabulary lacks tokens of the prompt.
        """
        logits = model(batch.inputs)
        if logits.shape[-1] < model.cfg.d_vocab:
            raise BadInput(
                f"objective 'next-token' predicts prompt tokens too, and the model has {logits.shape[-1]} output "
                f"tokens for {model.cfg.d_vocab} input tokens: leave d_vocab_out at d_vocab, or use 'answer'"
            )
        if isinstance(batch, GameBatch):
            return Loss(next_token_loss(logits, batch), {"labels": float(batch.scored[:, :-1].sum())})
        return Loss(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))


def next_token_loss(logits: Float[Tensor, "n length d_vocab_out"], batch: GameBatch) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the tokens that follow the positions of a game that count."""
    counts = batch.scored[:, :-1]
    return F.cross_entropy(logits[:, :-1][counts], batch.targets[counts])
