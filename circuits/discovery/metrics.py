"""What attribution explains: one number per example from the logits at the answer's position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.base import Pairs

Metric = Callable[[Float[Tensor, "batch d_vocab_out"], Pairs], Float[Tensor, " batch"]]


def logit_difference(logits: Float[Tensor, "batch d_vocab_out"], pairs: Pairs) -> Float[Tensor, " batch"]:
    """Return the logit of the clean input's answer minus that of the corrupt input's answer."""
    correct, wrong = (t.to(logits.device)[:, None] for t in (pairs.correct, pairs.wrong))
    return (logits.gather(1, correct) - logits.gather(1, wrong)).squeeze(1)


def log_probability(logits: Float[Tensor, "batch d_vocab_out"], pairs: Pairs) -> Float[Tensor, " batch"]:
    """Return the log probability, in nats, of the clean input's answer."""
    return logits.log_softmax(-1).gather(1, pairs.correct.to(logits.device)[:, None]).squeeze(1)


def measure(metric: Metric, logits: Float[Tensor, "batch pos d_vocab_out"], pairs: Pairs) -> Float[Tensor, " batch"]:
    """Return the metric of each example at the position of its answer.

    Raises:
        BadInput: the metric does not give one number per example.
    """
    rows = torch.arange(len(pairs), device=logits.device)
    values = metric(logits[rows, pairs.position.to(logits.device)], pairs)
    if not isinstance(values, Tensor) or values.shape != (len(pairs),):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise BadInput(f"metric {name_of(metric)} returned {got}: expected one number for each of {len(pairs)} pairs")
    return values


def name_of(metric: Metric) -> str:
    """Return the name under which a metric is reported."""
    return getattr(metric, "__name__", type(metric).__name__)


def check_pairs(pairs: Pairs) -> None:
    """Check that clean and corrupt inputs can be compared activation by activation.

    Raises:
        BadInput: they differ in length or number, there are none, or none differs.
    """
    if pairs.clean.shape != pairs.corrupt.shape:
        raise BadInput(
            f"clean inputs have shape {tuple(pairs.clean.shape)}, corrupt ones {tuple(pairs.corrupt.shape)}: "
            f"expected equal lengths, so that activations line up position by position"
        )
    if len(pairs) == 0:
        raise BadInput("there are no pairs: expected at least one")
    for name in ("position", "correct", "wrong"):
        if getattr(pairs, name).shape != (len(pairs),):
            raise BadInput(f"pairs.{name} has shape {tuple(getattr(pairs, name).shape)}: expected ({len(pairs)},)")
    if torch.equal(pairs.clean, pairs.corrupt):
        raise BadInput("every corrupt input equals its clean one: expected pairs that differ")
    last = pairs.clean.shape[1] - 1
    if bool((pairs.position < 0).any()) or bool((pairs.position > last).any()):
        raise BadInput(
            f"pairs.position goes from {int(pairs.position.min())} to {int(pairs.position.max())}: expected 0 to {last}"
        )


def select(pairs: Pairs, rows: slice) -> Pairs:
    """Return some of the pairs."""
    tensors = (pairs.clean, pairs.corrupt, pairs.position, pairs.correct, pairs.wrong)
    clean, corrupt, position, correct, wrong = (t[rows] for t in tensors)
    return Pairs(clean, corrupt, position, correct, wrong, pairs.changed)
