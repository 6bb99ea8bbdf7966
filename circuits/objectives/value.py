"""The value: of an answer, so that the loss grows with the numeric distance from it; of a game, its outcome."""

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
from circuits.objectives.heads import LinearHead
from circuits.objectives.outcome import outcome_loss
from circuits.tasks.base import Batch, Task
from circuits.tasks.games import Game, GameBatch, is_game

if TYPE_CHECKING:
    from circuits.model import HookedModel


@dataclass(frozen=True)
class Value:
    """Soft labels that fall off with numeric distance, and the expected distance: the farther a miss, the dearer it is.

    The label of answer c is proportional to exp(-d^2 / (2 sigma^2)), d its distance from the true answer (around
    the circle where the task is modular). To labels alone all misses beyond about five sigma are alike; so the expected
    distance of the prediction, sum_c p(c) d(c), is added as a share of the largest distance there is.

    On a game the value is its outcome, and nothing else is asked: at every position the cross-entropy of what the
    sequence comes to, by a linear head (who wins; where a walk ends; whether the goal is reached). There the fields
    have no effect.

    Attributes:
        sigma: width of the labels, in units of the answer.
        distance_weight: nats for a prediction that is as far off as any can be.

    Source: Diaz and Marathe 2019 (CVPR), "Soft labels for ordinal regression", equation 1 with squared distance; the
        expected distance is the earth mover's distance to a single answer, Hou, Yu and Samaras 2017 (arXiv 1611.05916);
        the outcome as the target of a value head, Silver et al. 2017 (Nature 550), "Mastering the game of Go without
        human knowledge".
    """

    name: ClassVar[str] = "value"

    sigma: float = 1.0
    distance_weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma, 0, above=True)
        check_number("distance_weight", self.distance_weight, 0)

    def check(self, task: Task | Game) -> None:
        """Return nothing.

        Raises:
            BadInput: an answer of the task is more than one token.
        """
        if not is_game(task):
            check_one_token_answers(self.name, task)

    def head(self, task: Task | Game, d_model: int, *, generator: torch.Generator) -> LinearHead | None:
        """Return the linear head that reads a game's outcome; None for a task with answers."""
        return LinearHead(d_model, len(task.outcome_names), generator) if is_game(task) else None

    def loss(
        self,
        model: HookedModel,
        task: Task | Game,
        batch: Batch | GameBatch,
        *,
        generator: torch.Generator,
        head: LinearHead | None = None,
    ) -> Loss:
        """Return the mean cross-entropy to the soft labels plus the weighted expected distance; of a game's outcome.

        Raises:
            BadInput: the model's output vocabulary lacks an answer.
        """
        if is_game(task):
            assert isinstance(batch, GameBatch) and head is not None
            return outcome_loss(model, task, batch, head)
        assert isinstance(batch, Batch)
        logits = answer_logits(model, batch.inputs)
        labels = soft_labels(task, self.sigma, logits.shape[-1], logits.device)
        answers = answer_index(task, logits.device)[batch.tokens[:, -1]]
        soft = F.cross_entropy(logits, labels[answers].to(logits.dtype))
        far = distances(task, logits.shape[-1], logits.device)[answers].to(logits.dtype)
        return Loss(soft + self.distance_weight * (logits.softmax(-1) * far).sum(-1).mean())


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


@remember
def distances(task: Task, d_vocab_out: int, device: torch.device) -> Float[Tensor, "n_answers d_vocab_out"]:
    """Return how far each output token is from each true answer, as a share of the largest distance.

    Tokens that are no answers are as far as any.

    Raises:
        BadInput: an answer is outside the output vocabulary.
    """
    share = task.distance().to(device) / task.distance().max()
    return 1 - onto_tokens(1 - share, task, d_vocab_out)
