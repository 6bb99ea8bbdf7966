"""Cross-entropy on the completion alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from circuits._decoding import last_logits
from circuits.objectives.base import (
    Loss,
    answer_logits,
    check_completions_fit,
    check_has_answers,
    completion,
    has_one_token_answers,
)
from circuits.tasks.base import Batch, Task

if TYPE_CHECKING:
    from circuits.model import HookedModel


@dataclass(frozen=True)
class Answer:
    """Cross-entropy on the tokens after the prompt alone: scratchpad, where there is one, and answer.

    Mean over these targets of -log p(token | tokens before it); no label of the prompt has any effect.

    Source: Power et al. 2022 (arXiv 2201.02177), section 2: loss on the answer part of an equation alone.
    """

    name: ClassVar[str] = "answer"

    def check(self, task: Any) -> None:
        """Return nothing.

        Raises:
            BadInput: the task is a game.
        """
        check_has_answers(self.name, task)

    def loss(self, model: HookedModel, task: Task, batch: Batch, *, generator: torch.Generator) -> Loss:
        """Return the mean cross-entropy over the completion's targets.

        Raises:
            BadInput: the model's output vocabulary lacks an answer.
        """
        if has_one_token_answers(task):
            logits, targets = answer_logits(model, batch.inputs), batch.tokens[:, -1]
        else:
            positions = completion(task)
            first = positions.start if isinstance(positions, slice) else positions[0]
            logits = last_logits(model, batch.inputs, batch.inputs.shape[1] - first)
            if not isinstance(positions, slice):
                logits = logits[:, [position - first for position in positions]]
            logits, targets = logits.flatten(0, 1), batch.targets[:, positions].flatten()
        check_completions_fit(task, logits.shape[-1])
        return Loss(F.cross_entropy(logits, targets))
