"""The gradient at every reader's input in the residual stream, from those behind its weights, summed over runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.activations import ALL, Store
from circuits.discovery.sites import Layer, Sites


class ReaderGradients:
    """The sum, over runs, of the gradient at every reader's input.

    With y = (x - mean) / s the standardised input, the gradient g of q goes back to (t - y (y . t) / d_model) / s,
    where t = W g is centred for LayerNorm; to t / s where the norm is frozen. Since W^T y is q without its offset,
    y . t costs one product per head and not one per model dimension. The weights are the same in every run, so that of
    W g / s the sum of g / s is kept; of the rest, which is no product with them, y and (y . t) of every run.

    Source: the Jacobian of LayerNorm (Ba et al. 2016, arXiv 1607.06450, equation 3) and RMSNorm (Zhang and
    Sennrich 2019, arXiv 1910.07467, equation 4), with the affine part folded into the weights.
    """

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self.sums: dict[str, Tensor] = {}
        """At q, k and v the sum of g / s; at an MLP's input and at the logits' that of the gradient."""
        self.along: dict[str, list[Float[Tensor, "batch pos head"]]] = {}
        """At q, k and v the (y . t) / d_model of every run."""
        self.standardised: list[list[Float[Tensor, "batch pos d_model"]]] = [[] for _ in sites.layers]
        self.places: list[slice] = []

    def add(self, values: Store, grads: Store) -> None:
        """Add what a run's activations and the gradients at them give."""
        self.places.append(_answer_positions(self.sites, grads))
        for i, layer in enumerate(self.sites.layers):
            x = values[layer.resid]
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            standardised, inverse = layer.norm.standardise(x)
            moves = layer.norm.kind is not None and not layer.norm.frozen
            if moves:
                self.standardised[i].append(standardised)
            for name, offset in zip(layer.qkv, layer.offsets, strict=True):
                grad = grads[name].to(x.dtype)
                if layer.norm.kind is not None:
                    grad = grad * inverse[..., None]
                self._sum(name, grad)
                if moves:
                    value = values[name].to(x.dtype)
                    along = ((value if offset is None else value - offset) * grad).sum(-1) / x.shape[-1]
                    self.along.setdefault(name, []).append(along)
            if layer.mlp_in is not None:
                self._sum(layer.mlp_in, _mlp_gradient(layer, standardised, inverse, grads[layer.mlp_in]))
        self._sum(self.sites.final, grads[self.sites.final])

    def _sum(self, name: str, tensor: Tensor) -> None:
        self.sums[name] = tensor if name not in self.sums else self.sums[name] + tensor

    @cached_property
    def at(self) -> slice:
        """The one position at which the last block's queries and MLP and the logits have a gradient, or all."""
        return self.places[0] if all(place == self.places[0] for place in self.places) else ALL

    def by_layer(self, *, everywhere: bool = False) -> Iterator[tuple[Float[Tensor, "reader batch _ d_model"], slice]]:
        """Yield the gradients in blocks of readers that see the same sources, and their positions.

        Args:
            everywhere: Whether all are wanted at all positions, where they are zero too.
        """
        at = ALL if everywhere else self.at
        for i, layer in enumerate(self.sites.layers):
            here = at if i + 1 == len(self.sites.layers) else ALL
            for which, span in [((0, 1, 2), ALL)] if here == ALL else [((0,), here), ((1, 2), ALL)]:
                yield self._at_inputs(i, layer, which, span), span
            if layer.mlp_in is not None:
                yield self.sums[layer.mlp_in][None, :, here], here
        yield self.sums[self.sites.final][None, :, at], at

    def _at_inputs(
        self, i: int, layer: Layer, which: Sequence[int], span: slice
    ) -> Float[Tensor, "reader batch pos d_model"]:
        """Return the gradient at the residual input of the queries (0), keys (1) and values (2), at some positions."""
        sums = [self.sums[layer.qkv[j]][:, span] for j in which]
        batch, pos = sums[0].shape[:2]
        counts, d_model = [part.shape[2] for part in sums], layer.W_back[0].shape[-1]
        out = torch.empty(sum(counts), batch * pos, d_model, dtype=sums[0].dtype, device=sums[0].device)
        for j, part, block in zip(which, sums, out.split(counts), strict=True):
            torch.bmm(part.flatten(0, 1).transpose(0, 1), layer.W_back[j].to(part.dtype), out=block)
            for along, y in zip(self.along.get(layer.qkv[j], []), self.standardised[i], strict=False):
                rows = along[:, span].flatten(0, 1).T[..., None]
                block.addcmul_(rows, y[:, span].flatten(0, 1)[None], value=-1)
        return out.view(-1, batch, pos, d_model)


def _mlp_gradient(
    layer: Layer,
    standardised: Float[Tensor, "batch pos d_model"],
    inverse: Float[Tensor, "batch pos 1"],
    grad: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """Return the gradient at the residual input of an MLP, which may share the norm of attention."""
    if not layer.shares_norm or layer.norm.kind is None:
        return grad
    t = grad.to(standardised.dtype) * inverse
    t = t if layer.norm.weight is None else t * layer.norm.weight
    t = t - t.mean(-1, keepdim=True) if layer.norm.kind == "LN" else t
    return t if layer.norm.frozen else t - standardised * (standardised * t).mean(-1, keepdim=True)


def _answer_positions(sites: Sites, grads: Store) -> slice:
    """Return the one position at which the last block's queries and MLP and the logits have a gradient, or all.

    A query's output, an MLP's and a logit are of their own position: where all pairs have their answer at one, that is
    the only one. It is looked for in the gradients, so that a model that is otherwise is none the worse.
    """
    last = sites.layers[-1]
    names = [last.qkv[0], sites.final, *([] if last.mlp_in is None else [last.mlp_in])]
    sizes = torch.stack([grads[name].flatten(2).abs().sum((0, 2)) for name in names])
    found = (sizes != 0).any(0).nonzero().flatten().tolist()
    return slice(found[0], found[0] + 1) if len(found) == 1 else ALL
