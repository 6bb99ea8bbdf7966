"""Edge pruning: hard-concrete masks driven to a target sparsity by a Lagrangian."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

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
def edge_pruning(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric | None = None,
    *,
    sparsity: float = 0.8,
    ablation: str | Mapping[str, Tensor] = "corrupt",
    steps: int = 400,
    learning_rate: float = 0.1,
    multiplier_rate: float = 0.05,
    mask_samples: int = 2,
    memory_budget: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Circuit:
    """Return each edge's probability of being kept, learned under a constraint on the share of edges removed.

    Minimises E[loss of the masked model] + l1 (t - s) + l2 (t - s)^2, where s is the expected share of edges removed,
    the target t grows from 0 to ``sparsity`` over the first half of the steps, and the multipliers l1 and l2 climb
    the same expression. Masks are hard-concrete. The loss is KL(model || masked model) in nats at the answer, or,
    with a metric, the squared difference of the metric from the model's. The round(E (1 - ``sparsity``)) most
    probable edges are kept.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair, or None for the divergence from the model's output.
        sparsity: Share of the edges to remove.
        ablation: What an ablated edge carries: see ``ablated_metric``.
        steps: Updates (Adam).
        learning_rate: Of the masks' log odds.
        multiplier_rate: Of the multipliers.
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

    Source: Bhaskar, Wettig, Friedman and Chen 2024, Finding Transformer Circuits with Edge Pruning, arXiv 2406.16778.

    Fails when: the target leaves fewer edges than the task needs; results depend on the seed.

    Raises:
        BadInput: the pairs do not line up, or an option is out of range.
        Diverged: the loss is not finite.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    if not 0 < sparsity < 1:
        raise BadInput(f"sparsity = {sparsity}: expected a share of the edges between 0 and 1")
    if mask_samples < 1:
        raise BadInput(f"mask_samples = {mask_samples}: expected at least 1")
    check_rates(learning_rate=learning_rate, multiplier_rate=multiplier_rate)
    pairs = beside(model, pairs)
    sites = sites_of(model)
    log_alpha = torch.full((sites.graph.n_edges,), 2.0, device=pairs.clean.device, requires_grad=True)
    multipliers = torch.zeros(2, device=pairs.clean.device, requires_grad=True)
    losses = fit(
        model,
        sites,
        pairs,
        metric,
        sample=lambda generator: hard_concrete(log_alpha, mask_samples, generator),
        penalty=_lagrangian(log_alpha, multipliers, sparsity, steps),
        optimizers=[
            torch.optim.Adam([log_alpha], lr=learning_rate),
            torch.optim.Adam([multipliers], lr=multiplier_rate, maximize=True),
        ],
        ablation=ablation,
        steps=steps,
        memory_budget=memory_budget,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        description="edge pruning",
    )
    scores = kept_probability(log_alpha.detach())
    reached = float(1 - scores.mean())
    details = {"pairs": len(pairs), "changed": pairs.changed, "ablation": name_of_ablation(ablation)}
    details |= {"sparsity": sparsity, "expected_sparsity": reached, "steps": steps, "loss": losses[-1]}
    name = "kl_divergence" if metric is None else name_of(metric)
    whole = torch.ones_like(scores, dtype=torch.bool)
    circuit = Circuit(sites.graph, scores, whole, "edge-pruning", name, details=details, signed=False)
    return circuit.top(round(sites.graph.n_edges * (1 - sparsity)))


def _lagrangian(log_alpha: Tensor, multipliers: Tensor, sparsity: float, steps: int) -> Callable[[], Tensor]:
    """What is added to the loss: l1 gap + l2 gap^2, the gap being to a target that grows over the first half."""
    calls = itertools.count(1)

    def penalty() -> Tensor:
        target = sparsity * min(1.0, next(calls) / (steps / 2))
        gap = target - (1 - kept_probability(log_alpha).mean())
        return multipliers[0] * gap + multipliers[1] * gap**2

    return penalty
