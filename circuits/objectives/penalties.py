"""Penalties on activations, as named parts of objectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.errors import BadInput

if TYPE_CHECKING:
    from circuits.model import HookedModel


class _TwoLevel(torch.autograd.Function):
    """``two_level`` with its gradient in closed form: a third of the operations that its graph would take."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        slope, above = (1 - h).clamp_(-1, 1), (h - 1).relu_()
        ctx.save_for_backward(h, slope, above)
        return (h * slope).square_().add_(above.square(), alpha=0.5)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        h, slope, above = ctx.saved_tensors
        # where the clamp is in force, its slope does not move with h
        inside = slope.abs() < 1
        return gradient * (2 * h * slope * torch.where(inside, slope - h, slope) + above)


def two_level(activations: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return h^2 * clamp(1 - h, -1, 1)^2 + 0.5 * relu(h - 1)^2: zero for h = 0 and h = 1, positive elsewhere.

    It pulls every activation to one of two levels, off (0) and on (1). Between them it is the double well
    h^2 (1 - h)^2; the clamp bounds the first term's growth below 0 and above 2 to h^2.

    Source: this project; the double well is the standard quartic potential h^2 (1 - h)^2.
    """
    result: Tensor = _TwoLevel.apply(activations)
    return result


@contextmanager
def mlp_activations(model: HookedModel) -> Iterator[list[Float[Tensor, "batch pos d_mlp"]]]:
    """Return a context whose list fills with the MLPs' activations, layer by layer, as the model is called in it.

    Raises:
        BadInput: the model has no MLP.
    """
    if getattr(model.cfg, "attn_only", False):
        raise BadInput("the model has attention only: a penalty on MLP activations needs a model with MLPs")
    activations: list[Tensor] = []

    def keep(activation: Tensor, hook: object) -> Tensor:
        activations.append(activation)
        return activation

    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(model.cfg.n_layers)]
    hooks: list[tuple[str | Callable[[str], bool], Callable[..., Tensor]]] = [(name, keep) for name in names]
    with model.hooks(fwd_hooks=hooks):
        yield activations


def two_level_penalty(activations: list[Float[Tensor, "batch pos d_mlp"]]) -> Float[Tensor, ""]:
    """Return the mean over the batch of the sum over all layers' neurons of ``two_level`` at the last position."""
    return torch.stack([two_level(layer[:, -1]).sum(-1).mean() for layer in activations]).sum()
