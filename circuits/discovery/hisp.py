"""Head importance scores for pruning, of every source, and the edges between the important ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.activations import Store
from circuits.discovery.attribution import Term, effects_of
from circuits.discovery.circuit import Circuit
from circuits.discovery.gradient_rules import GradientRules, rules_details
from circuits.discovery.metrics import Metric, logit_difference, name_of
from circuits.discovery.sites import Sites, sites_of
from circuits.errors import UnknownName
from circuits.model import HookedModel
from circuits.tasks.base import Pairs


def hisp(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    ablation: str = "corrupt",
    rules: GradientRules | str | None = None,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Return every edge's importance as the smaller of its two ends' head importance scores.

    The importance of a head or MLP is the mean over pairs of abs((a - a') . dm/da), a its output on the clean input
    and a' what ablation puts in its place, summed over positions and directions: to first order, what ablating it
    does. Importances are divided by the Euclidean norm of those of their block, heads and MLP together. The top edges
    are thereby those among the most important components (the subgraph that they induce); embeddings and logits count
    as important as the most important component.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position.
        ablation: ``corrupt``: a' is the output on the corrupt input; ``zero``: nothing, as in the paper on pruning.
        rules: Where gradients depart from the chain rule: ``"gim"``, ``"relp"`` or ``GradientRules`` of one's own.
        memory_budget: Bytes that the computation may take beside the model, its result included; None: 512 MB.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: two forwards and one backward.

    Conventions: no path is integrated: the gradient is that at the clean input. Scores are sizes and have no sign. A
        head has one importance, of its output, where Conmy et al. score its q, k and v. An edge's score per pair is
        that of the end which is the less important over all pairs.

    Source: Conmy et al. 2023, arXiv 2304.14997, appendix D.2 (the difference from the corrupt activation, which is
        left out for zero ablation; norms by layer, over heads and MLP as in their code), after Michel, Levy and Neubig
        2019, Are Sixteen Heads Really Better than One?, arXiv 1905.10650, section 4.1 (equation 2).

    Fails when: a component matters along one edge only, since all its edges are scored alike; and as every first-order
    score, when the metric is flat at the clean input.

    Raises:
        BadInput: the pairs do not line up, the metric gives no gradient, or the budget holds
            no pair.
        UnknownName: no such ablation, or no set of rules has this name.
        UnsupportedModel: the model has a part that edges cannot represent, or that a rule cannot.
    """
    if ablation not in PLANS:
        raise UnknownName("ablation of hisp", ablation, PLANS)
    sites = sites_of(model)
    names = [f"source {source}" for source in sites.graph.sources]
    importance = effects_of(
        model,
        sites,
        pairs,
        metric,
        PLANS[ablation],
        at=sites.source_hooks,
        names=names,
        rules=rules,
        memory_budget=memory_budget,
        batch_size=batch_size,
        progress=progress,
    )
    details = {"pairs": len(pairs), "changed": pairs.changed, "ablation": ablation} | rules_details(rules)
    return Circuit.of_effects(
        sites.graph,
        _between(sites, _normalised(sites, importance)),
        method="hisp",
        metric=name_of(metric),
        details=details,
        signed=False,
    )


def _of_corrupt(sites: Sites, corrupt: Store, clean: Store) -> list[Term]:
    return _along(sites, {name: clean[name].float() - corrupt[name].float() for name in sites.source_hooks})


def _of_zero(sites: Sites, corrupt: Store, clean: Store) -> list[Term]:
    return _along(sites, {name: clean[name].float() for name in sites.source_hooks})


def _along(sites: Sites, change: Store) -> list[Term]:
    def product(values: Store, grads: Store) -> Tensor:
        columns: list[Tensor] = []
        for name in sites.source_hooks:
            along = (change[name] * grads[name].float()).sum((1, -1)).abs()
            columns.append(along if along.ndim == 2 else along[:, None])
        return torch.cat(columns, 1)

    return [(None, product)]


PLANS = {"corrupt": _of_corrupt, "zero": _of_zero}
"""What importance is to first order: the effect of putting the corrupt output, or none, in a component's place."""


def _normalised(sites: Sites, importance: Float[Tensor, "pair source"]) -> Float[Tensor, "pair source"]:
    """Divide the importances of each block by the Euclidean norm of their means over pairs."""
    out = importance.clone()
    first = len(sites.graph.sources)
    for layer in reversed(sites.layers):
        last, first = first, first - len(layer.W_O) - layer.n_mlp_sources
        norm = importance[:, first:last].mean(0).norm()
        out[:, first:last] /= norm if norm > 0 else 1
    return out


def _between(sites: Sites, importance: Float[Tensor, "pair source"]) -> Float[Tensor, "pair edge"]:
    """The importance of each edge's less important end; a reader counts as the components that are computed from it."""
    graph, mean = sites.graph, importance.mean(0)
    computed = sorted({source for fed in graph.feeds for source in fed})

    def most(sources: Sequence[int]) -> int:
        return max(sources, key=lambda u: float(mean[u]))

    of_source = torch.tensor([u if u in computed else most(computed) for u in range(len(graph.sources))])
    of_reader = torch.tensor([most(fed or computed) for fed in graph.feeds])
    source, reader = graph.ends()
    ends = torch.stack([of_source[source], of_reader[reader]]).to(mean.device)
    return importance[:, ends.gather(0, mean[ends].argmin(0, keepdim=True))[0]]
