"""What every entry of every attention pattern does to the metric, to first order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.activations import Store, outside_inference_mode
from circuits.discovery.attribution import along_inputs, effects_of, integration_points
from circuits.discovery.circuit import mean_interval
from circuits.discovery.edge_products import Product
from circuits.discovery.gradient_rules import GradientRules
from circuits.discovery.metrics import Metric, logit_difference, name_of
from circuits.discovery.sites import Sites, sites_of
from circuits.errors import BadInput, UnsupportedModel
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class PatternAttribution:
    """The effect of corrupting each entry of each head's attention pattern, for every pair.

    An entry that supports the answer has a negative effect under ``logit_difference``.
    """

    per_example: Float[Tensor, "pair layer head query key"]
    metric: str

    @property
    def scores(self) -> Float[Tensor, "layer head query key"]:
        """The mean effect over pairs."""
        return self.per_example.mean(0)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per entry that any pair gives an effect, the largest first, with 95 % intervals."""
        import pandas as pd

        flat = self.per_example.flatten(1)
        order = self.scores.flatten().abs().argsort(descending=True, stable=True)
        order = order[(flat != 0).any(0)[order]]
        low, high = mean_interval(flat[:, order])
        columns = dict(
            zip(("layer", "head", "query", "key"), torch.unravel_index(order, self.scores.shape), strict=True)
        )
        numbers = {"score": flat.mean(0)[order], "low": low, "high": high}
        return pd.DataFrame({name: column.tolist() for name, column in (columns | numbers).items()})

    def figure(self, *, heads: int = 6) -> go.Figure:
        """Return the patterns' effects of the heads with the largest summed effect, query by key, on one scale.

        Raises:
            BadInput: ``heads`` is less than 1.
        """
        if heads < 1:
            raise BadInput(f"heads = {heads}: expected at least 1")
        return _draw(self, heads)

    def _repr_html_(self) -> str:
        return self.to_frame().head(15).to_html(float_format=lambda v: f"{v:+.4f}", index=False)


@outside_inference_mode
def attention_patterns(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    steps: int = 1,
    rules: GradientRules | str | None = None,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> PatternAttribution:
    """Return the first-order effect of giving each attention pattern's entry its value of the corrupt run.

    The effect of A[layer, head, query, key] is (A_corrupt - A_clean) dm/dA, the other entries held: where a head
    looks, apart from what it finds there. The gradient is taken at the clean input, or averaged over the ``steps``
    points of ``eap_ig_inputs``.

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position; ``logit_difference`` unless given.
        steps: Points on the path from the corrupt to the clean token embeddings.
        rules: Where gradients depart from the chain rule: ``"gim"``, ``"relp"`` or ``GradientRules`` of one's own.
        memory_budget: Bytes that the computation may take beside the model, its result included; None: 512 MB.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: ``steps`` + 1 forwards (one on the corrupt inputs) and ``steps`` backwards.

    Conventions: the clean end of the path is included, the corrupt end is not, so that one step takes the gradient at
        the clean input. The score is the effect of corrupting the entry: below zero it supports the answer under
        ``logit_difference``.

    Source: Nanda 2023, Attribution Patching: Activation Patching At Industrial Scale (neelnanda.io, attention
        patterns as the activations that are patched).

    Fails when: a pattern has saturated, so that its entries move together or not at all: an effect of one entry alone
    is not one that the softmax can bring about. Entries that agree between clean and corrupt score zero.

    Raises:
        BadInput: ``steps`` is less than 1, the pairs do not line up, the metric gives no gradient, or the budget holds
            no pair.
        UnknownName: no set of rules has this name.
        UnsupportedModel: the model has no patterns at a hook that its outputs are computed from, or a part that edges
            cannot represent.
    """
    points = integration_points(steps)
    sites = sites_of(model)
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(len(sites.layers))]
    for name in names:
        if name not in getattr(model, "hook_dict", {}):
            raise UnsupportedModel(f"{type(model).__name__} has no {name}: expected attention patterns to be hooked")
    heads, length = model.cfg.n_heads, pairs.clean.shape[1]

    def prepare(sites: Sites, corrupt: Store, clean: Store) -> Product:
        differences = torch.stack([corrupt[name] - clean[name] for name in names], 1)
        differences = differences.to(torch.promote_types(differences.dtype, torch.float32))

        def product(values: Store, grads: Store) -> Float[Tensor, "batch entry"]:
            return (differences * torch.stack([grads[name] for name in names], 1)).flatten(1)

        return product

    entries = itertools.product(range(len(names)), range(heads), range(length), range(length))
    effects = effects_of(
        model,
        sites,
        pairs,
        metric,
        along_inputs(points, prepare),
        # down to the embedding, so that the backward passes every place that a rule is laid at
        at=[*names, sites.embed, sites.final],
        names=[f"pattern a{i}.h{h}[{q}, {k}]" for i, h, q, k in entries],
        also=names,
        rules=rules,
        memory_budget=memory_budget,
        batch_size=batch_size,
        progress=progress,
    )
    return PatternAttribution(effects.unflatten(1, (len(names), heads, length, length)), name_of(metric))


def _draw(result: PatternAttribution, heads: int) -> go.Figure:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from circuits.discovery.figures import OPPOSES, SUPPORTS

    scores = result.scores
    size = scores.abs().sum((-1, -2)).flatten()
    chosen = size.argsort(descending=True, stable=True)[:heads]
    layers, numbers = (index.tolist() for index in torch.unravel_index(chosen, scores.shape[:2]))
    shown = scores[layers, numbers]
    largest = float(shown.abs().max()) or 1.0
    columns = min(3, len(layers))
    titles = [
        f"a{i}.h{h}, in all {float(shown[n].sum()):+.3g}" for n, (i, h) in enumerate(zip(layers, numbers, strict=True))
    ]
    figure = make_subplots(-(-len(layers) // columns), columns, subplot_titles=titles)
    for n, pattern in enumerate(shown.tolist()):
        trace = go.Heatmap(
            z=pattern,
            coloraxis="coloraxis",
            hovertemplate="from position %{y} to %{x}<br>effect %{z:+.4g}<extra></extra>",
        )
        figure.add_trace(trace, n // columns + 1, n % columns + 1)
    figure.update_xaxes(title="key position")
    figure.update_yaxes(title="query position", autorange="reversed")
    figure.update_layout(
        template="circuits",
        title=f"Attention patterns: effect of corrupting each entry<br><sup>{result.metric}, "
        f"{len(result.per_example)} pairs, the {len(layers)} heads with the largest effects</sup>",
        coloraxis={
            "colorscale": [[0, SUPPORTS], [0.5, "white"], [1, OPPOSES]],
            "cmin": -largest,
            "cmax": largest,
            "colorbar": {"title": result.metric},
        },
        height=120 + 300 * -(-len(layers) // columns),
    )
    return figure
