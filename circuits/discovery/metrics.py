"""What attribution explains: one number per example from the logits at the answer's position."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.discovery.graph import check_hooked
from circuits.discovery.memory import pairs_at_a_time
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

Metric = Callable[[Float[Tensor, "batch d_vocab_out"], Pairs], Float[Tensor, " batch"]]


def logit_difference(logits: Float[Tensor, "batch d_vocab_out"], pairs: Pairs) -> Float[Tensor, " batch"]:
    """Return the logit of the clean input's answer minus that of the corrupt input's answer."""
    correct, wrong = (_among(logits, t)[:, None] for t in (pairs.correct, pairs.wrong))
    return (logits.gather(1, correct) - logits.gather(1, wrong)).squeeze(1)


def log_probability(logits: Float[Tensor, "batch d_vocab_out"], pairs: Pairs) -> Float[Tensor, " batch"]:
    """Return the log probability, in nats, of the clean input's answer."""
    return logits.log_softmax(-1).gather(1, _among(logits, pairs.correct)[:, None]).squeeze(1)


def _among(logits: Float[Tensor, "batch d_vocab_out"], tokens: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Answers as indices of the logits."""
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < logits.shape[-1]:
        raise BadInput(
            f"an answer is token {int(tokens.max())}: expected 0 to {logits.shape[-1] - 1}, one of the logits"
        )
    return tokens.to(logits.device)


@dataclass(frozen=True, eq=False)
class Distance:
    """A metric that says how far the logits are from those of the clean run: zero there, and never less."""

    name: str
    between: Callable[[Float[Tensor, "batch d_vocab_out"], Float[Tensor, "batch d_vocab_out"]], Float[Tensor, " batch"]]
    """From clean and other logits to one number per example."""
    reference: Float[Tensor, "row d_vocab_out"]
    """The clean logits at the answer's position."""
    row: Mapping[tuple[int, ...], int]
    """Which row of the reference belongs to an example, by its clean tokens and its position."""
    _found: WeakKeyDictionary[Pairs, Tensor] = field(default_factory=WeakKeyDictionary, repr=False)

    @property
    def __name__(self) -> str:
        """The name under which the metric is reported, as a function's."""
        return self.name

    def __call__(self, logits: Float[Tensor, "batch d_vocab_out"], pairs: Pairs) -> Float[Tensor, " batch"]:
        """Return each example's distance.

        Raises:
            BadInput: a clean input is not among those that the metric was made from.
        """
        if pairs not in self._found:
            keys = _keys(pairs)
            unknown = [key for key in keys if key not in self.row]
            if unknown:
                *tokens, position = unknown[0]
                raise BadInput(
                    f"{self.name} knows no clean output for tokens {tokens} at position {position}: make the "
                    f"metric from all pairs that it is to be used on"
                )
            self._found[pairs] = torch.tensor([self.row[key] for key in keys], device=self.reference.device)
        reference = self.reference[self._found[pairs]]
        return self.between(reference.to(logits), logits)


def _keys(pairs: Pairs) -> list[tuple[int, ...]]:
    return [(*row, at) for row, at in zip(pairs.clean.tolist(), pairs.position.tolist(), strict=True)]


def kl_divergence(
    model: HookedModel, pairs: Pairs, *, memory_budget: int | None = None, batch_size: int = 256
) -> Distance:
    """Return a metric: the divergence KL(clean || other), in nats, of the output distributions at the answer.

    The clean model is run here, once; the metric finds an example's clean output again by its tokens.

    Args:
        model: The model in which edges will be ablated.
        pairs: All pairs that the metric will be used on.
        memory_budget: Bytes that the clean run may take beside the model, what is kept of it included; None: 512 MB
            beside that.
        batch_size: Pairs at a time, at most.

    Source: Conmy et al. 2023, arXiv 2304.14997, section 3.2 (with the full model's output as the reference).
    """

    def between(clean: Tensor, other: Tensor) -> Tensor:
        p, q = clean.log_softmax(-1), other.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    return Distance("kl_divergence", between, *_clean_logits(model, pairs, memory_budget, batch_size))


def squared_error(
    model: HookedModel, pairs: Pairs, *, memory_budget: int | None = None, batch_size: int = 256
) -> Distance:
    """Return a metric: the squared difference from the clean logits at the answer, averaged over the vocabulary.

    Arguments are those of ``kl_divergence``.

    Source: Miller, Chughtai and Saunders 2024, arXiv 2407.08734 (mean squared error as the measure of ACDC).
    """

    def between(clean: Tensor, other: Tensor) -> Tensor:
        return (other - clean).pow(2).mean(-1)

    return Distance("squared_error", between, *_clean_logits(model, pairs, memory_budget, batch_size))


def _clean_logits(
    model: HookedModel, pairs: Pairs, memory_budget: int | None, batch_size: int
) -> tuple[Float[Tensor, "row d_vocab_out"], dict[tuple[int, ...], int]]:
    check_pairs(pairs)
    pairs = beside(model, pairs)
    first: dict[tuple[int, ...], int] = {}
    for i, key in enumerate(_keys(pairs)):
        first.setdefault(key, i)
    chosen = torch.tensor(list(first.values()), device=pairs.clean.device)

    def logits_of(rows: Tensor) -> Tensor:
        logits = model(pairs.clean[rows])
        return logits[torch.arange(len(rows), device=logits.device), pairs.position[rows].to(logits.device)]

    with torch.no_grad():
        one = logits_of(chosen[:1])
        size = pairs_at_a_time(
            lambda n: logits_of(chosen[:n]),
            len(chosen),
            memory_budget=memory_budget,
            # gathered batch by batch, and then once more as one
            kept=2 * len(chosen) * one.numel() * one.element_size(),
            batch_size=batch_size,
            estimate=4 * len(chosen) * pairs.clean.shape[1] * one.numel() * one.element_size(),
        )
        found = [logits_of(rows) for rows in chosen.split(size)]
    return torch.cat(found), {key: i for i, key in enumerate(first)}


def is_distance(metric: Metric) -> bool:
    """Return whether a metric grows as the output departs from the clean one, whichever way."""
    return isinstance(metric, Distance)


def measure(metric: Metric, logits: Float[Tensor, "batch pos d_vocab_out"], pairs: Pairs) -> Float[Tensor, " batch"]:
    """Return the metric of each example at the position of its answer.

    Raises:
        BadInput: the metric does not give one number per example.
    """
    rows = torch.arange(len(pairs), device=logits.device)
    return measure_at_answers(metric, logits[rows, pairs.position.to(logits.device)], pairs)


def measure_at_answers(
    metric: Metric, logits: Float[Tensor, "batch d_vocab_out"], pairs: Pairs
) -> Float[Tensor, " batch"]:
    """Return the metric of each example, from the logits at the position of its answer.

    Raises:
        BadInput: the metric does not give one number per example.
    """
    values = metric(logits, pairs)
    if isinstance(values, Tensor) and values.dtype == torch.bool:
        values = values.to(logits.dtype)  # right or wrong, as accuracy
    if not isinstance(values, Tensor) or values.shape != (len(pairs),):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise BadInput(f"metric {name_of(metric)} returned {got}: expected one number for each of {len(pairs)} pairs")
    return values


NEAR = 0.01
"""How far beside the clean logits, in their own size, a metric's slope is compared with that at them."""


def is_flat(metric: Metric, logits: Float[Tensor, "batch pos d_vocab_out"], pairs: Pairs) -> bool:
    """Return whether the metric has no gradient at the clean logits, but for what rounding leaves.

    A divergence from stored clean logits, whoever wrote it, has its minimum there: its gradient is that of rounding,
    and grows by orders of magnitude a step aside, where that of other metrics hardly changes.

    Raises:
        BadInput: it does not depend on the logits.
    """
    if metric is logit_difference:
        return False  # linear in the logits: its slope is the same everywhere
    rows = torch.arange(len(pairs), device=logits.device)
    found = logits[rows, pairs.position.to(logits.device)].detach()
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    # a step to alternating sides, which is no shift of all logits alike, that a softmax would not see
    sides = 1 - 2 * (torch.arange(found.shape[-1], device=found.device) % 3 == 0).to(found)
    # how far logits lie apart is what counts: an offset of all of them changes nothing that a softmax sees
    step = NEAR * (found - found.mean(-1, keepdim=True)).abs().amax(-1, keepdim=True) * sides
    here, aside = (_slope(metric, at, pairs) for at in (found, found + step))
    return bool(torch.isfinite(here + aside)) and bool(here <= NEAR * aside)


def _slope(metric: Metric, logits: Float[Tensor, "batch d_vocab_out"], pairs: Pairs) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        at = logits.clone().requires_grad_()
        total = measure_at_answers(metric, at, pairs).sum()
        if not total.requires_grad:
            raise BadInput(f"metric {name_of(metric)} does not depend on the logits: expected a differentiable one")
        (gradient,) = torch.autograd.grad(total, at, allow_unused=True)
    return at.new_zeros(()) if gradient is None else gradient.norm()


def zero_gradient(metric: Metric, where: str) -> str:
    """Return what is said of a metric whose gradient is zero."""
    return (
        f"metric {name_of(metric)} has zero gradient at {where}: scores would all be zero. A divergence from the clean "
        f"output is flat at the clean point: use exact or acdc, which need no gradient, a method whose gradients are "
        f"taken elsewhere too (eap_ig_inputs with more than one step, mask_ig, clean_corrupted), or a metric such as "
        f"logit_difference"
    )


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
        values: Tensor = getattr(pairs, name)
        if values.shape != (len(pairs),):
            raise BadInput(f"pairs.{name} has shape {tuple(values.shape)}: expected ({len(pairs)},)")
        if values.is_floating_point() or values.dtype == torch.bool:
            raise BadInput(f"pairs.{name} is of {values.dtype}: expected whole numbers")
    if torch.equal(pairs.clean, pairs.corrupt):
        raise BadInput("every corrupt input equals its clean one: expected pairs that differ")
    last = pairs.clean.shape[1] - 1
    if bool((pairs.position < 0).any()) or bool((pairs.position > last).any()):
        raise BadInput(
            f"pairs.position goes from {int(pairs.position.min())} to {int(pairs.position.max())}: expected 0 to {last}"
        )


def beside(model: HookedModel, pairs: Pairs) -> Pairs:
    """Return the pairs on the device of a model.

    Raises:
        UnsupportedModel: the model has no TransformerLens hooks.
    """
    check_hooked(model)
    return pairs.to(model.cfg.device)


def select(pairs: Pairs, rows: slice) -> Pairs:
    """Return some of the pairs."""
    tensors = (pairs.clean, pairs.corrupt, pairs.position, pairs.correct, pairs.wrong)
    clean, corrupt, position, correct, wrong = (t[rows] for t in tensors)
    return Pairs(clean, corrupt, position, correct, wrong, pairs.changed)
