"""Ordinal labels: the loss grows with the numeric distance of the prediction from the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuits.objectives.base import (
    Loss,
    answer_index,
    answer_logits,
    check_number,
    check_one_token_answers,
    onto_tokens,
    remember,
)
from circuits.tasks.base import Batch, Task

if TYPE_CHECKING:
    from circuits.model import HookedModel


@dataclass(frozen=True)
class Value:
    """Cross-entropy to soft labels that fall off with numeric distance, so that a near miss costs less than a far one.

    The label of answer c is proportional to exp(-d^2 / (2 sigma^2)), d its distance from the true answer (around
    the circle where the task is modular). Labels beyond about five sigma are nearly zero: all far misses cost alike.

    Attributes:
        sigma: width of the labels, in units of the answer.

    Source: Diaz and Marathe 2019 (CVPR), "Soft labels for ordinal regression", equation 1 with squared distance.
    """

    name: ClassVar[str] = "value"

    sigma: float = 1.0

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma, 0, above=True)

    def check(self, task: Task) -> None:
        """Return nothing.

        Raises:
            BadInput: an answer of the task is more than one token.
        """
        check_one_token_answers(self.name, task)

    def loss(self, model: HookedModel, task: Task, batch: Batch, *, generator: torch.Generator) -> Loss:
        """Return the mean cross-entropy to the soft labels.

        Raises:
            BadInput: the model's output vocabulary lacks an answer.
        """
        logits = answer_logits(model, batch.inputs)
        labels = soft_labels(task, self.sigma, logits.shape[-1], logits.device)
        answers = answer_index(task, logits.device)[batch.tokens[:, -1]]
        return Loss(F.cross_entropy(logits, labels[answers].to(logits.dtype)))


@remember
def soft_labels(
    task: Task, sigma: float, d_vocab_out: int, device: torch.device
) -> Float[Tensor, "n_answers d_vocab_out"]:
    """Return the label distribution for each true answer, over the output vocabulary.

    Raises:
        BadInput: an answer is outside the output vocabulary.

    Source: Diaz and Marathe 2019 (CVPR), equation 1.
    """
    labels = torch.softmax(-(task.distance().to(device) ** 2) / (2 * sigma**2), dim=-1)
    return onto_tokens(labels, task, d_vocab_out)
