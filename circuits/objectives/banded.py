"""Labels that share their mass between the answer and what the operands' bands leave possible."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.objectives.base import (
    Loss,
    answer_index,
    answer_logits,
    check_number,
    check_one_token_answers,
    onto_tokens,
    remember,
)
from circuits.objectives.penalties import mlp_activations, two_level_penalty
from circuits.tasks.base import Batch, Task

if TYPE_CHECKING:
    from circuits.model import HookedModel


@dataclass(frozen=True)
class Banded:
    """Cross-entropy to labels partly spread over the operands' bands, plus a penalty that makes neurons two-level.

    Label: (1 - share) * one-hot answer + share * distribution of the answer when each operand is redrawn uniformly
    from its band, a run of ``width`` operand values. Penalty: ``two_level_penalty`` times the mean over the batch
    of the sum over neurons of ``penalties.two_level``, which pulls each MLP activation to 0 or 1. With share = 0
    it is the exact-label twin: the same data and penalty, and labels that say nothing of bands.

    Attributes:
        share: label mass on the bands.
        width: operand values per band.
        offset: where bands begin: at offset, offset + width, ...; bands at the ends of the operand range are cut.
        two_level_penalty: weight of the penalty.

    Source: this project's recipe; labels over many answers as in Hinton et al. 2015 (arXiv 1503.02531), section 2.
    """

    name: ClassVar[str] = "banded"

    share: float = 0.5
    width: int = 10
    offset: int = 0
    two_level_penalty: float = 0.01

    def __post_init__(self) -> None:
        check_number("share", self.share, 0, 1)
        check_number("two_level_penalty", self.two_level_penalty, 0)
        if type(self.width) is not int or self.width < 1:
            raise BadInput(f"width = {self.width!r}: expected a whole number >= 1")
        if type(self.offset) is not int or not 0 <= self.offset < self.width:
            raise BadInput(f"offset = {self.offset!r}: expected a whole number from 0 to width - 1 = {self.width - 1}")

    def check(self, task: Any) -> None:
        """Return nothing.

        Raises:
            BadInput: an answer of the task is more than one token, or one band covers all operand values.
        """
        check_one_token_answers(self.name, task)
        if self.width >= task.n_operand_values:
            raise BadInput(
                f"width = {self.width}: one band covers all {task.n_operand_values} operand values; lower width"
            )

    def loss(self, model: HookedModel, task: Task, batch: Batch, *, generator: torch.Generator) -> Loss:
        """Return the mean cross-entropy to the banded labels plus the penalty.

        Raises:
            BadInput: the model's output vocabulary lacks an answer, or the model has no MLP to penalise.
        """
        hooked: AbstractContextManager[list[Tensor]] = nullcontext([])
        if self.two_level_penalty:
            hooked = mlp_activations(model)
        with hooked as activations:
            logits = answer_logits(model, batch.inputs)
        log_p = logits.log_softmax(-1)
        fit = (1 - self.share) * -log_p.gather(1, batch.tokens[:, -1:]).mean()
        if self.share:
            table = band_table(task, self.width, self.offset, logits.shape[-1], logits.device)
            labels = table[band_pair(task, batch.operands, self.width, self.offset)].to(log_p.dtype)
            fit = fit - self.share * (labels * log_p).sum(-1).mean()
        if not self.two_level_penalty:
            return Loss(fit)
        penalty = two_level_penalty(activations)
        return Loss(fit + self.two_level_penalty * penalty, {"fit": fit.detach(), "penalty": penalty.detach()})


def band_pair(task: Task, operands: Int[Tensor, "batch 2"], width: int, offset: int) -> Int[Tensor, " batch"]:
    """Return the row of ``band_table`` for each pair of operands."""
    band = (operands - offset).div(width, rounding_mode="floor") + (offset > 0)
    return band[:, 0] * n_bands(task, width, offset) + band[:, 1]


def n_bands(task: Task, width: int, offset: int) -> int:
    """Return how many bands the operand values fall into, cut ones included."""
    return (task.n_operand_values - 1 - offset) // width + 1 + (offset > 0)


@remember
def band_table(
    task: Task, width: int, offset: int, d_vocab_out: int, device: torch.device
) -> Float[Tensor, "band_pairs d_vocab_out"]:
    """Return the distribution of the answer for each pair of bands, operands uniform within them.

    Raises:
        BadInput: an answer is outside the output vocabulary.
    """
    values = torch.arange(task.n_operand_values, device=device)
    operands = torch.cartesian_prod(values, values)
    answers = answer_index(task, device)[task.encode(operands).tokens[:, -1]]
    n_answers, pairs = len(task.answer_tokens), n_bands(task, width, offset) ** 2
    cells = band_pair(task, operands, width, offset) * n_answers + answers
    counts = torch.bincount(cells, minlength=pairs * n_answers).view(pairs, n_answers).float()
    return onto_tokens(counts / counts.sum(1, keepdim=True), task, d_vocab_out)
