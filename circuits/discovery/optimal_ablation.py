"""Optimal ablation: for every source the constant that hurts least when it takes the source's place."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.discovery.ablate import shared_replacement
from circuits.discovery.activations import outside_inference_mode
from circuits.discovery.learned_masks import fit
from circuits.discovery.metrics import Metric, beside
from circuits.discovery.sites import Sites, sites_of
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


@outside_inference_mode
def optimal_constants(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric | None = None,
    *,
    steps: int = 200,
    learning_rate: float = 0.01,
    memory_budget: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Return for every source one constant, the same at all positions, to give to ``ablation=`` of other functions.

    The constant of source u minimises the loss of the model in which u alone is replaced by it along all its edges:
    KL(model || ablated model) in nats at the answer, or, with a metric, the squared difference of the metric from the
    model's. All sources are trained at once, one ablated model each, from the mean over inputs and positions.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs; only the clean ones are read.
        metric: One number per pair, or None for the divergence from the model's output.
        steps: Updates (Adam).
        learning_rate: Of the constants.
        memory_budget: Bytes that the computation may take beside the model: the pairs of an update are then taken in
            parts. None: no bound.
        batch_size: Pairs per update.
        seed: Of the pairs that are drawn.
        progress: Whether to show a bar.

    Cost: a forward for the means, and a forward and a backward per step for sources x ``batch_size`` inputs.

    Conventions: one constant per source, the same at all positions and for all inputs; it replaces the source along all
        its edges.

    Source: Li and Janson 2024, Optimal ablation for interpretability, arXiv 2409.09951, section 2.

    Fails when: several sources are ablated together, since each constant is the best for its source alone.

    Raises:
        BadInput: the pairs do not line up, or an option is out of range.
        Diverged: the loss is not finite.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    pairs = beside(model, pairs)
    sites = sites_of(model)
    constants = starting_constants(model, sites, pairs, memory_budget=memory_budget)
    source, _ = sites.graph.ends(pairs.clean.device)
    numbers = torch.arange(len(sites.graph.sources), device=source.device)
    keep = (source[None] != numbers[:, None]).to(constants[sites.embed].dtype)
    fit(
        model,
        sites,
        pairs,
        metric,
        sample=lambda generator: keep,
        penalty=lambda: torch.zeros((), device=source.device),
        optimizers=[torch.optim.Adam(list(constants.values()), lr=learning_rate)],
        ablation="mean",
        steps=steps,
        memory_budget=memory_budget,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        description="optimal constants",
        constants=constants,
    )
    return {name: constant.detach() for name, constant in constants.items()}


def starting_constants(
    model: HookedModel, sites: Sites, pairs: Pairs, *, memory_budget: int | None = None
) -> dict[str, Tensor]:
    """Return each source's mean over inputs and positions, to be trained; found within a budget."""
    means = shared_replacement(model, sites, pairs, "mean", memory_budget=memory_budget)
    assert means is not None  # which only corrupt activations are
    return {name: value.mean(1, keepdim=True).detach().clone().requires_grad_() for name, value in means.items()}
