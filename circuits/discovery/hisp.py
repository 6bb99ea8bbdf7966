"""Head importance scores for pruning, of every source, and the edges between the important ones."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.discovery.activations import Store
from circuits.discovery.attribution import Term, effects_of
from circuits.discovery.circuit import Circuit
from circuits.discovery.gradient_rules import GradientRules, rules_details
from circuits.discovery.metrics import Metric, logit_difference, name_of
from circuits.discovery.sites import Sites, sites_of
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


def hisp(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    rules: GradientRules | str | None = None,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Return every edge's importance as the smaller of its two ends' head importance scores.

    The importance of a head or MLP on one clean input is abs(a . dm/da), a its output, summed over positions and
    directions: to first order, what setting it to zero does. The top edges are thereby those among the most
    important components (the subgraph that they induce); embeddings and logits count as important as the most
    important component.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position.
        rules: Where gradients depart from the chain rule: ``"gim"``, ``"relp"`` or ``GradientRules`` of one's own.
        memory_budget: Bytes that the computation may take beside the model, its result included; None: 512 MB.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: two forwards (that on the corrupt inputs is for the checks only) and one backward.

    Conventions: no path is integrated: the gradient is that at the clean input. Scores are sizes and have no sign.

    Source: Michel, Levy and Neubig 2019, Are Sixteen Heads Really Better than One?, arXiv 1905.10650, section 4.1
        (equation 2); used as a baseline of circuit discovery by Conmy et al. 2023, arXiv 2304.14997.

    Fails when: a component matters along one edge only, since all its edges are scored alike; and as every first-order
    score, when the metric is flat at the clean input.

    Raises:
        BadInput: the pairs do not line up, the metric gives no gradient, or the budget holds
            no pair.
        UnknownName: no set of rules has this name.
        UnsupportedModel: the model has a part that edges cannot represent, or that a rule cannot.
    """
    sites = sites_of(model)
    names = [f"source {source}" for source in sites.graph.sources]
    importance = effects_of(
        model,
        sites,
        pairs,
        metric,
        _plan,
        at=sites.source_hooks,
        names=names,
        rules=rules,
        memory_budget=memory_budget,
        batch_size=batch_size,
        progress=progress,
    )
    details = {"pairs": len(pairs), "changed": pairs.changed} | rules_details(rules)
    return Circuit.of_effects(
        sites.graph,
        _between(sites, importance),
        method="hisp",
        metric=name_of(metric),
        details=details,
        signed=False,
    )


def _plan(sites: Sites, corrupt: Store, clean: Store) -> list[Term]:
    def product(values: Store, grads: Store) -> Tensor:
        columns: list[Tensor] = []
        for name in sites.source_hooks:
            along = (values[name].float() * grads[name].float()).sum((1, -1)).abs()
            columns.append(along if along.ndim == 2 else along[:, None])
        return torch.cat(columns, 1)

    return [(None, product)]


def _between(sites: Sites, importance: Tensor) -> Tensor:
    """The smaller importance of an edge's ends; a reader counts as the components that are computed from it."""
    graph = sites.graph
    most = importance.amax(1, keepdim=True)
    computed = {source for fed in graph.feeds for source in fed}
    of_source = torch.cat([importance[:, [s]] if s in computed else most for s in range(len(graph.sources))], 1)
    of_reader = torch.cat([of_source[:, list(fed)].amax(1, keepdim=True) if fed else most for fed in graph.feeds], 1)
    source, reader = graph.ends(importance.device)
    return torch.minimum(of_source[:, source], of_reader[:, reader])
