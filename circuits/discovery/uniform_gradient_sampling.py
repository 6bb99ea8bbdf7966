"""Uniform gradient sampling: masks whose gradients come only from edges that are partly ablated."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from circuits.discovery.ablate import name_of_ablation
from circuits.discovery.activations import outside_inference_mode
from circuits.discovery.circuit import Circuit
from circuits.discovery.learned_masks import check_rates, fit
from circuits.discovery.metrics import Metric, beside, name_of
from circuits.discovery.optimal_ablation import starting_constants
from circuits.discovery.sites import sites_of
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


@outside_inference_mode
def uniform_gradient_sampling(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric | None = None,
    *,
    price: float = 1.0,
    ablation: str | Mapping[str, Tensor] = "optimal",
    steps: int = 300,
    learning_rate: float = 0.1,
    constant_rate: float = 0.01,
    mask_samples: int = 8,
    memory_budget: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Circuit:
    """Return each edge's probability of being kept, from gradients at edges sampled uniformly between 0 and 1.

    With p_e the probability of keeping edge e, its scale in a sample is uniform on (0, 1) with probability
    p_e (1 - p_e), and otherwise 1 or 0 such that its mean is p_e. dloss/dscale at the uniform ones estimates what
    keeping the edge does to the loss, loss(kept) - loss(ablated); times dp/dlogit = p (1 - p), which cancels against
    their share, it is the gradient of the logit. To the loss, ``price`` x mean(p) is added. The masks of a step run
    together, ``mask_samples`` x ``batch_size`` inputs in one forward and backward. With ``optimal`` ablation one
    constant per source replaces it where it is ablated, and is trained along, starting from the source's mean. The
    edges with p > 1/2 are kept.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair, or None for the divergence from the model's output.
        price: Of keeping all edges, in the loss's unit. More gives smaller circuits.
        ablation: What an ablated edge carries: ``optimal``, or as in ``ablated_metric``.
        steps: Updates (Adam).
        learning_rate: Of the logits of p.
        constant_rate: Learning rate of the constants of ``optimal`` ablation.
        mask_samples: Masks per update.
        memory_budget: Bytes that the computation may take beside the model: the pairs of an update are then taken in
            parts. None: no bound.
        batch_size: Pairs per update.
        seed: Of masks and pairs.
        progress: Whether to show a bar.

    Cost: one forward on the clean inputs, and then, at every step, a forward and a backward through every reader's sum
        over its sources for ``mask_samples`` x ``batch_size`` inputs, and a forward on ``batch_size`` corrupt inputs
        where those are what ablated edges carry.

    Conventions: a scale of 1 is the model's own edge, 0 the ablated one, and the uniform scales take neither end.
        Scores are probabilities and have no sign.

    Source: Li and Janson 2024, Optimal ablation for interpretability, arXiv 2409.09951 (UGS).

    Fails when: the price and the loss are far apart, so that all edges or none are kept; results depend on the seed.

    Raises:
        BadInput: the pairs do not line up, or an option is out of range.
        Diverged: the loss is not finite.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    if not 0 <= price < math.inf:
        raise BadInput(f"price = {price}: expected 0 or more")
    if mask_samples < 1:
        raise BadInput(f"mask_samples = {mask_samples}: expected at least 1")
    check_rates(learning_rate=learning_rate, constant_rate=constant_rate)
    pairs = beside(model, pairs)
    sites = sites_of(model)
    logit = torch.full((sites.graph.n_edges,), 2.0, device=pairs.clean.device, requires_grad=True)
    optimizers = [torch.optim.Adam([logit], lr=learning_rate)]
    constants = None
    if ablation == "optimal":
        constants = starting_constants(model, sites, pairs, memory_budget=memory_budget)
        optimizers.append(torch.optim.Adam(list(constants.values()), lr=constant_rate))
    losses = fit(
        model,
        sites,
        pairs,
        metric,
        sample=lambda generator: uniform_samples(logit, mask_samples, generator),
        penalty=lambda: price * torch.sigmoid(logit).mean(),
        optimizers=optimizers,
        ablation=ablation,
        steps=steps,
        memory_budget=memory_budget,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        description="uniform gradient sampling",
        constants=constants,
    )
    scores = torch.sigmoid(logit.detach())
    details = {"pairs": len(pairs), "changed": pairs.changed, "price": price, "steps": steps, "loss": losses[-1]}
    details |= {"ablation": name_of_ablation(ablation)}
    name = "kl_divergence" if metric is None else name_of(metric)
    method = "uniform-gradient-sampling"
    return Circuit(sites.graph, scores, scores > 0.5, method, name, details=details, signed=False)


def uniform_samples(logit: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return scales [n, edge] of every edge, whose gradient reaches ``logit`` where a scale is between 0 and 1.

    Source: Li and Janson 2024, arXiv 2409.09951.
    """
    p = torch.sigmoid(logit.detach())
    between = p * (1 - p)
    which, value = torch.rand(2, n, len(p), generator=generator, device=p.device, dtype=p.dtype)
    is_between = which < between
    # what is left of the probability goes to 1 and 0 such that the mean stays p
    scale = torch.where(is_between, value, (which < between + p - between / 2).to(p.dtype))
    return scale + torch.where(is_between, logit - logit.detach(), torch.zeros_like(scale))
