"""The engine under every learned mask: gradient descent on the loss of sampled, partly ablated models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.ablate import ablated_logits, replacement, shared_replacement
from circuits.discovery.activations import check_model
from circuits.discovery.memory import churning, pairs_at_a_time
from circuits.discovery.metrics import Metric, check_pairs, measure, name_of
from circuits.discovery.sites import Sites
from circuits.errors import BadInput, Diverged
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

Sample = Callable[[torch.Generator], Float[Tensor, "set edge"]]
"""Draws scales of every edge between ablated (0) and kept (1), differentiable in what is learned."""

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Temperature and stretch of the hard-concrete distribution, the values of Louizos et al. 2018, section 4."""


def check_rates(**rates: float) -> None:
    """Check learning rates.

    Raises:
        BadInput: one is not a finite number above 0.
    """
    for name, value in rates.items():
        if not 0 < value < math.inf:
            raise BadInput(f"{name} = {value}: expected a number above 0")


def fit(
    model: HookedModel,
    sites: Sites,
    pairs: Pairs,
    metric: Metric | None,
    *,
    sample: Sample,
    penalty: Callable[[], Float[Tensor, ""]],
    optimizers: Sequence[torch.optim.Optimizer],
    ablation: str | Mapping[str, Tensor],
    steps: int,
    batch_size: int,
    seed: int,
    progress: bool,
    description: str,
    constants: Mapping[str, Tensor] | None = None,
    memory_budget: int | None = None,
) -> list[float]:
    """Take ``steps`` of the optimizers on the masked models' loss plus the penalty, and return the loss of each step.

    The loss of a masked model is the divergence KL(model || masked model), in nats, at the answer, or the squared
    difference of the metric from the model's where a metric is given; it is averaged over pairs and samples.

    Args:
        model: The model, whose own parameters are left as they are.
        sites: Its sources and readers.
        pairs: Clean and corrupt inputs.
        metric: One number per pair, or None for the divergence.
        sample: Draws the masks of one step.
        penalty: What is added to the loss.
        optimizers: Hold the learned parameters.
        ablation: What an ablated edge carries.
        steps: Updates.
        batch_size: Pairs per update, drawn without replacement.
        seed: Of the pairs and masks that are drawn.
        progress: Whether to show a bar.
        description: What the bar is called.
        constants: Learned replacements, by hook name, that ``ablation`` gives way to.
        memory_budget: Bytes that the computation may take beside the model: the pairs of an update are taken in parts,
            whose gradients are added up. None: all at once.

    Raises:
        BadInput: the pairs do not line up, ``steps`` or ``batch_size`` is less than 1, the budget does not hold one
            pair, or the loss is not finite before anything is learned.
        Diverged: the loss is not finite.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise BadInput(f"{name} = {value}: expected at least 1")
    check_pairs(pairs)
    check_model(model, sites, pairs.clean)
    generator = torch.Generator(device=pairs.clean.device).manual_seed(seed)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    shared = constants
    if shared is None:
        shared = shared_replacement(model, sites, pairs, ablation, memory_budget=memory_budget, batch_size=batch_size)
    batch = _Batch(model, sites, pairs, metric, parameters, shared)
    drawn = sample(torch.Generator(device=pairs.clean.device).manual_seed(seed))
    size = batch.prepare(drawn, min(batch_size, len(pairs)), memory_budget)
    losses: list[float] = []
    with torch.inference_mode(False), torch.enable_grad():
        for step in tqdm(range(steps), desc=description, unit="step", disable=not progress):
            rows = torch.randperm(len(pairs), generator=generator, device=pairs.clean.device)[:batch_size]
            loss, gradients = batch.gradients(rows, sample(generator), size)
            losses.append(loss)
            if not math.isfinite(loss):
                if step > 0:
                    raise Diverged(f"the loss is {loss} at step {step}: expected a finite one; lower learning_rate")
                what = f"the metric {name_of(metric)}" if metric else "the output"
                raise BadInput(f"{what} of a masked model is not finite: check the metric and the model's weights")
            _assign(parameters, gradients, penalty())
            for optimizer in optimizers:
                optimizer.step()
    if len(losses) > 1 and len(set(losses)) == 1:
        what = name_of(metric) if metric else "the output"
        raise BadInput(f"no ablation changes {what} at all: expected a metric that depends on the logits")
    return losses


def hard_concrete(log_alpha: Float[Tensor, " edge"], n: int, generator: torch.Generator) -> Float[Tensor, "set edge"]:
    """Return samples in [0, 1] of which a share is exactly 0 or 1, differentiable in ``log_alpha``.

    Source: Louizos, Welling and Kingma 2018, Learning Sparse Neural Networks through L0 Regularization,
        arXiv 1712.01312, equations 10 and 11.
    """
    u = torch.rand(n, len(log_alpha), generator=generator, device=log_alpha.device, dtype=log_alpha.dtype)
    u = u.clamp(1e-6, 1 - 1e-6)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def kept_probability(log_alpha: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    """Return the probability that a hard-concrete sample is not exactly 0.

    Source: Louizos et al. 2018, arXiv 1712.01312, equation 12.
    """
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


def rows_of(pairs: Pairs, rows: Int[Tensor, " row"]) -> Pairs:
    """Return the pairs of the given numbers."""
    tensors = (pairs.clean, pairs.corrupt, pairs.position, pairs.correct, pairs.wrong)
    clean, corrupt, position, correct, wrong = (t[rows] for t in tensors)
    return Pairs(clean, corrupt, position, correct, wrong, pairs.changed)


@dataclass(eq=False)
class _Batch:
    """The loss of masked models on some pairs, and its gradients."""

    model: HookedModel
    sites: Sites
    pairs: Pairs
    metric: Metric | None
    parameters: Sequence[Tensor]
    shared: Mapping[str, Tensor] | None
    """The replacements that all pairs have in common; None where each pair has its own."""
    reference: Float[Tensor, "pair ..."] | None = None
    """What the whole model gives for each pair."""

    def prepare(self, keep: Float[Tensor, "set edge"], size: int, memory_budget: int | None) -> int:
        """Run the whole model on all pairs, and return how many of ``size`` pairs fit the budget at a time."""
        every = torch.arange(len(self.pairs), device=self.pairs.clean.device)
        if memory_budget is not None:
            one = self.reference_of(every[:1])
            size = pairs_at_a_time(
                lambda n: self.gradients(every[:n], keep, n),
                size,
                memory_budget=churning(memory_budget),
                kept=one.numel() * one.element_size() * len(every),
            )
        at_a_time = 256 if memory_budget is None else size
        self.reference = torch.cat([self.reference_of(rows) for rows in every.split(at_a_time)])
        return size

    def reference_of(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "row ..."]:
        """Return what the whole model gives for some pairs."""
        part = rows_of(self.pairs, rows)
        with torch.no_grad():
            logits = self.model(part.clean)
            if self.metric is None:
                return _at_answer(logits, part).log_softmax(-1)
            return measure(self.metric, logits, part)

    def gradients(
        self, rows: Int[Tensor, " row"], keep: Float[Tensor, "set edge"], size: int
    ) -> tuple[float, list[Tensor | None]]:
        """Return the mean loss under the masks ``keep``, and its gradient by parameter, from ``size`` pairs at a time.

        The masks' own graph is gone through once, at the end.
        """
        with torch.inference_mode(False), torch.enable_grad():
            masks = keep.detach().requires_grad_(keep.requires_grad)
            wanted = [t for t in (masks, *(self.shared or {}).values()) if t.requires_grad]
            total, sums = 0.0, [torch.zeros_like(t) for t in wanted]
            for some in rows.split(size):
                loss = self._loss(some, masks) * (len(some) / len(rows))
                if not loss.requires_grad:
                    what = name_of(self.metric) if self.metric else "the output"
                    raise BadInput(f"no ablation changes {what} at all: expected a metric that depends on the logits")
                total += float(loss.detach())
                for part, sum_ in zip(torch.autograd.grad(loss, wanted, allow_unused=True), sums, strict=True):
                    if part is not None:
                        sum_ += part
            found = {id(t): sum_ for t, sum_ in zip(wanted, sums, strict=True)}
            by_mask: Sequence[Tensor | None] = [None] * len(self.parameters)
            if keep.requires_grad:
                # a rehearsal goes through the graph of its masks more than once
                again = self.reference is None
                at_masks = found[id(masks)]
                by_mask = torch.autograd.grad(keep, self.parameters, at_masks, retain_graph=again, allow_unused=True)
            return total, [found.get(id(p), of_mask) for p, of_mask in zip(self.parameters, by_mask, strict=True)]

    def _loss(self, rows: Int[Tensor, " row"], masks: Float[Tensor, "set edge"]) -> Float[Tensor, ""]:
        part = rows_of(self.pairs, rows)
        replaced = self.shared
        if replaced is None:
            replaced = replacement(self.model, self.sites, part, "corrupt")
        reference = self.reference_of(rows) if self.reference is None else self.reference[rows]
        logits = ablated_logits(self.model, self.sites, part.clean, replaced, masks)
        return torch.stack([_distance(one, part, reference, self.metric) for one in logits]).mean()


def _assign(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], penalty: Float[Tensor, ""]) -> None:
    """Give every parameter the sum of its gradient and the penalty's."""
    of_penalty: Sequence[Tensor | None] = [None] * len(parameters)
    if penalty.requires_grad:
        of_penalty = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for parameter, *parts in zip(parameters, gradients, of_penalty, strict=True):
        found = [part for part in parts if part is not None]
        parameter.grad = torch.stack(found).sum(0) if found else None


def _distance(logits: Tensor, part: Pairs, reference: Tensor, metric: Metric | None) -> Float[Tensor, ""]:
    if metric is not None:
        return (measure(metric, logits, part) - reference).pow(2).mean()
    masked = _at_answer(logits, part).log_softmax(-1)
    return (reference.exp() * (reference - masked)).sum(-1).mean()


def _at_answer(logits: Tensor, part: Pairs) -> Float[Tensor, "batch d_vocab_out"]:
    return logits[torch.arange(len(part), device=logits.device), part.position.to(logits.device)]
