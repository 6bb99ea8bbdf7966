"""What one plain forward pass tells: every source's output and, backwards, the gradient at every reader's input."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.discovery.gradient_rules import GradientRules, Rewriting
from circuits.discovery.metrics import Metric, measure, name_of
from circuits.discovery.sites import Layer, Neurons, Sites, check_exact, check_hooks
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

Store = dict[str, Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])


def outside_inference_mode(function: Function) -> Function:
    """Return a function that works where its caller is in inference mode too: what it makes may have gradients."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return cast(Function, called)


ALL = slice(None)


def source_values(model: HookedModel, sites: Sites, tokens: Int[Tensor, "batch pos"]) -> Store:
    """Return the activations that determine every source's output, by hook name, without gradients."""
    return values_at(model, sites.source_hooks, tokens)


def check_model(model: HookedModel, sites: Sites, tokens: Int[Tensor, "batch pos"]) -> None:
    """Check on one input that the sources add up to the stream and that each reader reads it as assumed.

    Raises:
        UnsupportedModel: naming the first place where the model does something else.
    """
    check_exact(sites, values_at(model, sites.all_hooks, tokens[:1]))


def activations_at(
    model: HookedModel, names: Sequence[str], tokens: Int[Tensor, "batch pos"]
) -> tuple[Store, Float[Tensor, "batch pos d_vocab_out"]]:
    """Return the activations of a plain run at some hooks, by name, and its logits, without gradients.

    Raises:
        UnsupportedModel: the model passes one of them by.
    """
    store: Store = {}
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, _keep(store, name)) for name in names]):
        logits = model(tokens)
    check_hooks(model, names, store, "is never reached in a run")
    return store, logits


def values_at(model: HookedModel, names: Sequence[str], tokens: Int[Tensor, "batch pos"]) -> Store:
    """Return the same without the logits."""
    return activations_at(model, names, tokens)[0]


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
    needed: Callable[[Store], bool] | None = None,
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
        needed: Whether gradients are, told by the activations; without them there is no backward, and none are given.

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
        check_hooks(model, [*sites.all_hooks, *at], store, "is never reached in a run")
        total = measure(metric, logits, pairs).sum()
        if not total.requires_grad:
            raise BadInput(f"metric {name_of(metric)} does not depend on the logits: expected a differentiable one")
        values = {name: tensor.detach() for name, tensor in store.items()}
        if needed is not None and not needed(values):
            return values, {}, logits.detach()
        found = torch.autograd.grad(total, [store[name] for name in at], allow_unused=True)
    if not given:
        # Where an activation is put in place, what lies before it has no gradient to rule.
        rewriting.check(name for name, gradient in zip(at, found, strict=True) if gradient is None)
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
    sites: Sites,
    corrupt: Mapping[str, Tensor],
    clean: Mapping[str, Tensor],
    *,
    sources: Container[int] | None = None,
    at: slice = ALL,
) -> Float[Tensor, "source batch _ d_model"]:
    """Return what each source writes on the corrupt run minus what it writes on the clean one.

    Args:
        sites: The sources.
        corrupt: Activations of the corrupt run.
        clean: Activations of the clean run.
        sources: The numbers of those that are wanted; None for all. The heads of a layer, and the neurons of an MLP,
            are wanted together or not at all.
        at: The positions that are wanted.
    """
    first = clean[sites.embed]
    dtype = torch.promote_types(first.dtype, torch.float32)
    chosen = [writer for writer in sites.writers if sources is None or writer.first in sources]
    n_positions = len(range(first.shape[1])[at])
    shape = (sum(writer.n for writer in chosen), len(first), n_positions, first.shape[2])
    out = torch.empty(shape, dtype=dtype, device=first.device)
    start = 0
    for writer in chosen:
        rows, start = out[start : start + writer.n], start + writer.n
        one_source = writer.parts is None  # [..., pos, d_model]; the others have a dimension more, or neurons
        now, before = (x[writer.hook][..., at, :] if one_source else x[writer.hook][:, at] for x in (corrupt, clean))
        change = now - before
        if isinstance(writer.parts, Layer):
            # into its place: these are most of what is written here, and a copy costs as much as the product
            z = change.to(dtype).flatten(0, 1).transpose(0, 1)
            torch.bmm(z, writer.parts.W_O.to(dtype), out=rows.view(writer.n, -1, first.shape[2]))
        elif isinstance(writer.parts, Neurons):
            rows[:] = neuron_outputs(writer.parts, change.to(dtype))
        else:
            rows[0] = change
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
