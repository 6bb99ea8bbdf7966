"""Edge attribution patching with integrated gradients over the activations of each group of sources."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.activations import Store, source_differences
from circuits.discovery.attribution import Plan, Term, effects_of, integration_points
from circuits.discovery.circuit import Circuit
from circuits.discovery.edge_products import Product
from circuits.discovery.gradient_rules import GradientRules, rules_details
from circuits.discovery.metrics import Metric, is_distance, logit_difference, name_of
from circuits.discovery.reader_gradients import ReaderGradients
from circuits.discovery.sites import Sites, sites_of
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


def eap_ig_activations(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    steps: int = 5,
    rules: GradientRules | str | None = None,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Return every edge's effect, with the gradient averaged from the corrupt to the clean output of its sources.

    As ``eap``, but for the edges that leave a group of sources (an embedding, the heads of a layer, an MLP) dm/dx_v
    is the mean over k = 1 ... ``steps`` of the gradient on the clean input while that group writes
    corrupt + (k / steps) (clean - corrupt).

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position.
        steps: Points on each path.
        rules: Where gradients depart from the chain rule: ``"gim"``, ``"relp"`` or ``GradientRules`` of one's own.
        memory_budget: Bytes that the computation may take beside the model, its result included; None: 512 MB.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: 2 + G (``steps`` - 1) forwards and 1 + G (``steps`` - 1) backwards, with G the number of groups: 2 layers + 1,
        or + 2 with a position embedding.

    Conventions: the clean end of each path is included, the corrupt end is not, so that one step is ``eap``. (The
        released code adds the gradients of every group's path to all edges, and not only to those that leave the
        group.) The score is the effect of corrupting the edge: below zero it supports the answer under
        ``logit_difference`` (MIB's files have the opposite sign).

    Source: Hanna, Pezzelle and Belinkov 2024, arXiv 2403.17806 (``EAP-IG-activations`` in the released code).

    Fails when: sources of different layers only matter together, since each group moves while the others stay clean.
    Components that differ in nothing between clean and corrupt score zero.

    Raises:
        BadInput: ``steps`` is less than 1, the pairs do not line up, the metric gives no gradient, or the budget holds
            no pair.
        UnknownName: no set of rules has this name.
        UnsupportedModel: the model has a part that edges cannot represent, or that a rule cannot.
    """
    sites = sites_of(model)
    names = [f"edge {source} -> {reader}" for source, reader in sites.graph.edges]
    effects = effects_of(
        model,
        sites,
        pairs,
        metric,
        _along_activations(integration_points(steps)),
        at=sites.reader_hooks,
        names=names,
        rules=rules,
        memory_budget=memory_budget,
        batch_size=batch_size,
        progress=progress,
    )
    details = {"pairs": len(pairs), "changed": pairs.changed, "steps": steps} | rules_details(rules)
    return Circuit.of_effects(
        sites.graph,
        effects,
        method="eap-ig-activations",
        metric=name_of(metric),
        details=details,
        signed=not is_distance(metric),
    )


def _along_activations(points: list[float]) -> Plan:
    def plan(sites: Sites, corrupt: Store, clean: Store) -> list[Term]:
        differences = source_differences(sites, corrupt, clean).transpose(0, 1)
        terms: list[Term] = []
        for name, first, last in _groups(sites):
            product = _product(sites, differences, first, last, len(points))
            way = clean[name] - corrupt[name]
            if bool((way != 0).any()):
                terms += [(None if t == 1.0 else {name: corrupt[name] + t * way}, product) for t in points]
        return terms

    return plan


def _groups(sites: Sites) -> list[tuple[str, int, int]]:
    """The hook of each group of sources, with the numbers of its first source and of the first one after it."""
    groups: list[tuple[str, int, int]] = []
    heads = {layer.z: layer.W_O.shape[0] for layer in sites.layers}
    for name in sites.source_hooks:
        first = groups[-1][2] if groups else 0
        groups.append((name, first, first + heads.get(name, 1)))
    return groups


def _product(
    sites: Sites, differences: Float[Tensor, "batch source pos d_model"], first: int, last: int, n_points: int
) -> Product:
    """Prepare the product of some sources' differences with the gradients of the readers that see them."""
    graph = sites.graph
    source, reader = graph.ends(differences.device)

    def product(values: Store, grads: Store) -> Float[Tensor, "batch edge"]:
        dense = differences.new_zeros(len(differences), len(graph.readers), len(graph.sources))
        at, gathered = 0, ReaderGradients(sites)
        gathered.add(values, grads)
        for gradient, here in gathered.by_layer():
            rows = gradient.to(differences.dtype).transpose(0, 1).flatten(2)
            if graph.visible[at] >= last:
                found = torch.bmm(rows, differences[:, first:last, here].flatten(2).transpose(1, 2))
                dense[:, at : at + rows.shape[1], first:last] = found / n_points
            at += rows.shape[1]
        return dense[:, reader, source]

    return product
