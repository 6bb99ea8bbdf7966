"""Subnetwork probing on edges: hard-concrete masks with a price on every edge kept."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from circuits.discovery.ablate import name_of_ablation
from circuits.discovery.activations import outside_inference_mode
from circuits.discovery.circuit import Circuit
from circuits.discovery.learned_masks import check_rates, fit, hard_concrete, kept_probability
from circuits.discovery.metrics import Metric, beside, name_of
from circuits.discovery.sites import sites_of
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


@outside_inference_mode
def subnetwork_probing(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric | None = None,
    *,
    price: float = 1.0,
    ablation: str | Mapping[str, Tensor] = "corrupt",
    steps: int = 300,
    learning_rate: float = 0.1,
    mask_samples: int = 2,
    memory_budget: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Circuit:
    """Return each edge's probability of being kept, learned with a price on the expected share of edges kept.

    Minimises E[loss of the masked model] + ``price`` x mean over edges of P(mask > 0), with hard-concrete masks that
    start at P about 0.9. The loss is KL(model || masked model) in nats at the answer, or, with a metric, the squared
    difference of the metric from the model's. The edges with P > 1/2 are kept.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair, or None for the divergence from the model's output.
        price: Of keeping all edges, in the loss's unit. More gives smaller circuits.
        ablation: What an ablated edge carries: see ``ablated_metric``.
        steps: Updates (Adam).
        learning_rate: Of the masks' log odds.
        mask_samples: Masks per update.
        memory_budget: Bytes that the computation may take beside the model: the pairs of an update are then taken in
            parts. None: no bound.
        batch_size: Pairs per update.
        seed: Of masks and pairs.
        progress: Whether to show a bar.

    Cost: one forward on the clean inputs, and then, at every step, a forward and a backward through every reader's sum
        over its sources for ``mask_samples`` x ``batch_size`` inputs, and a forward on ``batch_size`` corrupt inputs
        where those are what ablated edges carry.

    Conventions: a mask of 1 is the model's own edge, 0 the ablated one. Scores are probabilities and have no sign. No
        path is integrated.

    Source: Cao, Sanh and Rush 2021, arXiv 2104.03514 (probing subnetworks by hard-concrete masks); on edges with the
        activations of a corrupt run, Conmy et al. 2023, arXiv 2304.14997, appendix, and Miller et al. 2024,
        arXiv 2407.08734.

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
    check_rates(learning_rate=learning_rate)
    pairs = beside(model, pairs)
    sites = sites_of(model)
    log_alpha = torch.full((sites.graph.n_edges,), 2.0, device=pairs.clean.device, requires_grad=True)
    losses = fit(
        model,
        sites,
        pairs,
        metric,
        sample=lambda generator: hard_concrete(log_alpha, mask_samples, generator),
        penalty=lambda: price * kept_probability(log_alpha).mean(),
        optimizers=[torch.optim.Adam([log_alpha], lr=learning_rate)],
        ablation=ablation,
        steps=steps,
        memory_budget=memory_budget,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        description="subnetwork probing",
    )
    scores = kept_probability(log_alpha.detach())
    details = {
        "pairs": len(pairs),
        "changed": pairs.changed,
        "ablation": name_of_ablation(ablation),
        "price": price,
        "steps": steps,
        "loss": losses[-1],
    }
    name = "kl_divergence" if metric is None else name_of(metric)
    return Circuit(sites.graph, scores, scores > 0.5, "subnetwork-probing", name, details=details, signed=False)
