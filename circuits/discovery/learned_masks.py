"""The engine under every learned mask: gradient descent on the loss of sampled, partly ablated models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.ablate import ablated_logits, replacement
from circuits.discovery.activations import check_model
from circuits.discovery.metrics import Metric, check_pairs, measure, name_of
from circuits.discovery.sites import Sites
from circuits.errors import BadInput, Diverged
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

Sample = Callable[[torch.Generator], Float[Tensor, "set edge"]]
"""Draws scales of every edge between ablated (0) and kept (1), differentiable in what is learned."""

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Temperature and stretch of the hard-concrete distribution, the values of Louizos et al. 2018, section 4."""


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

    Raises:
        BadInput: the pairs do not line up, or ``steps`` or ``batch_size`` is less than 1.
        Diverged: the loss is not finite.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise BadInput(f"{name} = {value}: expected at least 1")
    check_pairs(pairs)
    check_model(model, sites, pairs.clean)
    generator = torch.Generator(device=pairs.clean.device).manual_seed(seed)
    reference = _reference(model, pairs, metric)
    shared = constants if constants is not None else _shared(model, sites, pairs, ablation)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    losses: list[float] = []
    with torch.inference_mode(False), torch.enable_grad():
        for step in tqdm(range(steps), desc=description, unit="step", disable=not progress):
            rows = torch.randperm(len(pairs), generator=generator, device=pairs.clean.device)[:batch_size]
            part = rows_of(pairs, rows)
            replaced = replacement(model, sites, part, "corrupt") if shared is None else shared
            logits = ablated_logits(model, sites, part.clean, replaced, sample(generator))
            loss = torch.stack([_distance(one, part, reference[rows], metric) for one in logits]).mean()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise Diverged(f"the loss is {losses[-1]} at step {step}: expected a finite one; lower learning_rate")
            gradients = torch.autograd.grad(loss + penalty(), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
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


def _shared(
    model: HookedModel, sites: Sites, pairs: Pairs, ablation: str | Mapping[str, Tensor]
) -> Mapping[str, Tensor] | None:
    """The replacements that all pairs have in common; None where each pair has its own."""
    return None if ablation == "corrupt" else replacement(model, sites, pairs, ablation, batch_size=256)


def _reference(model: HookedModel, pairs: Pairs, metric: Metric | None) -> Float[Tensor, "pair ..."]:
    found: list[Tensor] = []
    with torch.no_grad():
        for rows in torch.arange(len(pairs), device=pairs.clean.device).split(256):
            part = rows_of(pairs, rows)
            logits = model(part.clean)
            found.append(_at_answer(logits, part).log_softmax(-1) if metric is None else measure(metric, logits, part))
    return torch.cat(found)


def _distance(logits: Tensor, part: Pairs, reference: Tensor, metric: Metric | None) -> Float[Tensor, ""]:
    if metric is not None:
        return (measure(metric, logits, part) - reference).pow(2).mean()
    masked = _at_answer(logits, part).log_softmax(-1)
    return (reference.exp() * (reference - masked)).sum(-1).mean()


def _at_answer(logits: Tensor, part: Pairs) -> Float[Tensor, "batch d_vocab_out"]:
    return logits[torch.arange(len(part), device=logits.device), part.position.to(logits.device)]
