"""Information-flow routes: how much of what a reader sees each source accounts for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.activations import Store, check_model, head_outputs, source_values
from circuits.discovery.attribution import pair_slices
from circuits.discovery.circuit import Circuit
from circuits.discovery.metrics import Metric, beside, check_pairs, logit_difference, select
from circuits.discovery.sites import Sites, sites_of
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


def information_flow_routes(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Return every edge's share in what its reader sees on the clean inputs; no gradient, and no corrupt run.

    With y the reader's input, the sum of the sources a_u that it sees and of biases, the importance of u at a
    position is ``max(0, |y| - |y - a_u|)`` in the L1 norm, divided by the sum of that over all sources (zero where no
    source has any); scores are means over positions and pairs. The metric has no part in it.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs, of which only the clean ones are read.
        metric: Not used; here so that every method is called alike.
        memory_budget: Bytes that the computation may take beside the model, its result included; None: 512 MB.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: one forward, no backward.

    Conventions: the clean run alone is looked at, and no path is integrated. Scores are shares, from zero to one, and
        have no sign.

    Source: Ferrando and Voita 2024, Information Flow Routes, arXiv 2403.00824, section 2.2 (proximity of Kobayashi
        and Ferrando, L1 norm).

    Fails when: what matters is small: a source that writes much into directions that no reader uses scores high.

    Raises:
        BadInput: the pairs do not line up, an activation is not finite, or the budget does not hold one pair.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    check_pairs(pairs)
    pairs = beside(model, pairs)
    sites = sites_of(model)
    check_model(model, sites, pairs.clean)

    def shares(rows: slice) -> Float[Tensor, "pair edge"]:
        values = source_values(model, sites, select(pairs, rows).clean)
        return torch.cat([_shares(*seen) for seen in _seen(sites, values)], 1)

    n_edges = sites.graph.n_edges
    slices = pair_slices(
        lambda n: shares(slice(n)),
        sites,
        pairs,
        model.cfg,
        kept=4 * len(pairs) * n_edges,
        memory_budget=memory_budget,
        batch_size=batch_size,
    )
    found: Tensor | None = None
    for rows in tqdm(slices, desc="information flow", unit="batch", disable=not progress or len(slices) == 1):
        part = shares(rows)
        if not bool(torch.isfinite(part).all()):
            raise BadInput("a source's output is not finite: check the model's weights")
        found = part.new_empty(len(pairs), n_edges) if found is None else found
        found[rows] = part
    assert found is not None  # there are pairs
    details = {"pairs": len(pairs), "changed": pairs.changed}
    return Circuit.of_effects(
        sites.graph,
        found,
        method="information-flow-routes",
        metric="none",
        details=details,
        signed=False,
    )


def _seen(sites: Sites, values: Store) -> Iterator[tuple[int, list[Tensor], Tensor]]:
    """Yield how many readers see the same, the outputs of the sources that they see, and the biases beside them."""
    sources = [values[sites.embed][None]]
    bias = torch.zeros_like(values[sites.embed][:1, :1])
    if sites.pos_embed is not None:
        sources.append(values[sites.pos_embed].expand_as(values[sites.embed])[None])
    for i, layer in enumerate(sites.layers):
        yield sum(W.shape[0] for W in layer.W), sources, bias
        before, bias_before = list(sources), bias
        sources = [*sources, head_outputs(layer, values[layer.z])]
        bias = bias if layer.b_O is None else bias + layer.b_O
        if layer.mlp_out is not None:
            parallel = sites.graph.is_parallel(i)
            yield (1, before, bias_before) if parallel else (1, sources, bias)
            sources = [*sources, values[layer.mlp_out][None]]
    yield 1, sources, bias


def _shares(readers: int, sources: list[Tensor], bias: Tensor) -> Float[Tensor, "batch edge"]:
    seen = torch.cat(sources)
    y = seen.sum(0) + bias
    proximity = (y.abs().sum(-1) - (y - seen).abs().sum(-1)).clamp_min(0)
    total = proximity.sum(0)
    shares = (proximity / total.where(total > 0, torch.ones_like(total))).mean(-1).T
    return shares.repeat(1, readers)
