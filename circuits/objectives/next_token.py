"""Cross-entropy on every next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from circuits.errors import BadInput
from circuits.objectives.base import Loss
from circuits.tasks.base import Batch, Task

if TYPE_CHECKING:
    from circuits.model import HookedModel


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy on every next token of a sequence, those of the prompt included.

    Mean over all targets of -log p(token | tokens before it). The prompt's own tokens cannot be foreseen where
    operands are drawn independently, so there the loss stays at their entropy.

    Source: Radford et al. 2018, "Improving language understanding by generative pre-training", section 3.1.
    """

    name: ClassVar[str] = "next-token"

    def check(self, task: Task) -> None:
        """Return nothing: every task has next tokens."""

    def loss(self, model: HookedModel, task: Task, batch: Batch, *, generator: torch.Generator) -> Loss:
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
        return Loss(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))
