"""What one plain forward pass tells: every source's output and, backwards, the gradient at every reader's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.discovery.gradient_rules import GradientRules, Rewriting
from circuits.discovery.metrics import Metric, measure, name_of
from circuits.discovery.sites import Layer, Neurons, Sites, check_exact
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

Store = dict[str, Tensor]


def source_values(model: HookedModel, sites: Sites, tokens: Int[Tensor, "batch pos"]) -> Store:
    """Return the activations that determine every source's output, by hook name, without gradients."""
    return values_at(model, sites.source_hooks, tokens)


def check_model(model: HookedModel, sites: Sites, tokens: Int[Tensor, "batch pos"]) -> None:
    """Check on one input that the sources add up to the stream and that each reader reads it as assumed.

    Raises:
        UnsupportedModel: naming the first place where the model does something else.
    """
    check_exact(sites, values_at(model, sites.all_hooks, tokens[:1]))


def values_at(model: HookedModel, names: Sequence[str], tokens: Int[Tensor, "batch pos"]) -> Store:
    """Return the activations at some hooks, by name, without gradients."""
    store: Store = {}
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, _keep(store, name)) for name in names]):
        model(tokens)
    return store


def gradients(
    model: HookedModel,
    sites: Sites,
    tokens: Int[Tensor, "batch pos"],
    pairs: Pairs,
    metric: Metric,
    *,
    at: Sequence[str],
    replaced: Mapping[str, Tensor] | None = None,
    rules: GradientRules | None = None,
) -> tuple[Store, Store, Tensor]:
    """Return a run's activations, the gradient of each example's metric at the hooks ``at``, and the logits.

    Gradients are taken on activations only: no parameter's gradient is computed or touched.

    Args:
        model: The model.
        sites: Its sources and readers.
        tokens: What it reads.
        pairs: The pairs that the metric is computed on.
        metric: One number per example.
        at: The hooks at which gradients are wanted.
        replaced: Activations to put in place of the model's own, by hook name.
        rules: Where the backward departs from the chain rule.

    Raises:
        BadInput: the metric does not depend on the logits.
        UnsupportedModel: a rule cannot take hold in this model.
    """
    store: Store = {}
    given = replaced or {}

    def start(tensor: Tensor, *, hook: Any) -> Tensor:
        # A leaf of its own, so that there is a graph even where all parameters are frozen.
        store[sites.embed] = given.get(sites.embed, tensor).detach().requires_grad_()
        return store[sites.embed]

    hooks = [
        (name, _branch(store, name, given.get(name)))
        for name in {**dict.fromkeys(sites.all_hooks), **dict.fromkeys(at)}
        if name != sites.embed
    ]
    with torch.inference_mode(False), torch.enable_grad():
        rewriting = Rewriting(rules or GradientRules(), model, sites)
        with (
            rewriting.attached() as (before, after),
            model.hooks(fwd_hooks=[(sites.embed, start), *before, *hooks, *after]),
        ):
            logits = model(tokens)
        total = measure(metric, logits, pairs).sum()
        if not total.requires_grad:
            raise BadInput(f"metric {name_of(metric)} does not depend on the logits: expected a differentiable one")
        found = torch.autograd.grad(total, [store[name] for name in at], allow_unused=True)
    if not given:
        # Where an activation is put in place, what lies before it has no gradient to rule.
        rewriting.check(name for name, gradient in zip(at, found, strict=True) if gradient is None)
    values = {name: tensor.detach() for name, tensor in store.items()}
    grads = {n: torch.zeros_like(values[n]) if g is None else g for n, g in zip(at, found, strict=True)}
    return values, grads, logits.detach()


def _keep(store: Store, name: str) -> Callable[..., None]:
    def hook(tensor: Tensor, *, hook: Any) -> None:
        store[name] = tensor

    return hook


def _branch(store: Store, name: str, given: Tensor | None) -> Callable[..., Tensor]:
    """A hook that passes its value on as a view, which is what lies downstream even where the hook converts shapes."""

    def hook(tensor: Tensor, *, hook: Any) -> Tensor:
        value = tensor if given is None else given
        if given is not None or not tensor.requires_grad:
            value = value.detach().requires_grad_()
        store[name] = value.view_as(value)
        return store[name]

    return hook


def source_differences(
    sites: Sites, corrupt: Mapping[str, Tensor], clean: Mapping[str, Tensor]
) -> Float[Tensor, "source batch pos d_model"]:
    """Return what each source writes on the corrupt run minus what it writes on the clean one."""
    first = clean[sites.embed]
    dtype = torch.promote_types(first.dtype, torch.float32)
    out = torch.empty(len(sites.graph.sources), *first.shape, dtype=dtype, device=first.device)
    out[0] = corrupt[sites.embed] - first
    at = 1
    if sites.pos_embed is not None:
        out[1] = corrupt[sites.pos_embed] - clean[sites.pos_embed]
        at = 2
    for layer in sites.layers:
        heads = layer.W_O.shape[0]
        out[at : at + heads] = head_outputs(layer, (corrupt[layer.z] - clean[layer.z]).to(dtype))
        at += heads
        if layer.neurons is not None:
            post = layer.neurons.post
            out[at : at + layer.n_mlp_sources] = neuron_outputs(layer.neurons, (corrupt[post] - clean[post]).to(dtype))
        elif layer.mlp_out is not None:
            out[at] = corrupt[layer.mlp_out] - clean[layer.mlp_out]
        at += layer.n_mlp_sources
    return out


def head_outputs(layer: Layer, z: Float[Tensor, "*batch pos head d_head"]) -> Float[Tensor, "head *batch pos d_model"]:
    """Return what each head writes, without the output bias, which belongs to no head."""
    rows = z.flatten(0, -3).transpose(0, 1)
    return torch.bmm(rows, layer.W_O.to(z.dtype)).unflatten(1, z.shape[:-2])


def neuron_outputs(
    neurons: Neurons, post: Float[Tensor, "*batch pos neuron"]
) -> Float[Tensor, "neuron *batch pos d_model"]:
    """Return what each neuron writes, without the output bias, which belongs to none."""
    W = neurons.W_out.to(post.dtype)
    return post.movedim(-1, 0)[..., None] * W.view(len(W), *[1] * (post.ndim - 1), -1)


def reader_gradients(
    sites: Sites, i: int, values: Mapping[str, Tensor], grads: Mapping[str, Tensor]
) -> Float[Tensor, "reader batch pos d_model"]:
    """Return the gradient at the residual input of each q, k and v of layer ``i``, from those at q, k and v.

    With y = (x - mean) / s the standardised input, the gradient g of q goes back to
    (t - y (y . t) / d_model) / s, where t = W g is centred for LayerNorm; to t / s where the norm is frozen.
    Since W^T y is q without its offset, y . t costs one product per head and not one per model dimension.

    Source: the Jacobian of LayerNorm (Ba et al. 2016, arXiv 1607.06450, equation 3) and RMSNorm (Zhang and
    Sennrich 2019, arXiv 1910.07467, equation 4), with the affine part folded into the weights.
    """
    layer = sites.layers[i]
    x = values[layer.resid]
    dtype = torch.promote_types(x.dtype, torch.float32)
    standardised, inverse = layer.norm.standardise(x.to(dtype))
    n, d_model = x.shape[0] * x.shape[1], x.shape[2]
    counts = [W.shape[0] for W in layer.W]
    out = torch.empty(sum(counts), n, d_model, dtype=dtype, device=x.device)
    at = 0
    for name, W, offset, count in zip(layer.qkv, layer.W_back, layer.offsets, counts, strict=True):
        grad = grads[name].to(dtype)
        if layer.norm.kind is not None:
            grad = grad * inverse[..., None]
        block = out[at : at + count]
        torch.bmm(grad.flatten(0, 1).transpose(0, 1), W.to(dtype), out=block)
        if layer.norm.kind is not None and not layer.norm.frozen:
            value = values[name].to(dtype)
            along = ((value if offset is None else value - offset) * grad).sum(-1) / d_model
            block.addcmul_(along.flatten(0, 1).T[..., None], standardised.view(1, n, d_model), value=-1)
        at += count
    return out.view(-1, *x.shape)


def mlp_gradient(
    sites: Sites, i: int, values: Mapping[str, Tensor], grads: Mapping[str, Tensor]
) -> Float[Tensor, "1 batch pos d_model"]:
    """Return the gradient at the residual input of the MLP of layer ``i``, as ``reader_gradients`` does for heads."""
    layer = sites.layers[i]
    assert layer.mlp_in is not None
    grad = grads[layer.mlp_in]
    if not layer.shares_norm or layer.norm.kind is None:
        return grad[None]
    x = values[layer.resid]
    dtype = torch.promote_types(x.dtype, torch.float32)
    standardised, inverse = layer.norm.standardise(x.to(dtype))
    t = grad.to(dtype) * inverse
    t = t if layer.norm.weight is None else t * layer.norm.weight
    t = t - t.mean(-1, keepdim=True) if layer.norm.kind == "LN" else t
    if not layer.norm.frozen:
        t = t - standardised * (standardised * t).mean(-1, keepdim=True)
    return t[None]
