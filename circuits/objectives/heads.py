"""Heads: what is trained beside the hooked trunk to read something from its last residual stream.

They stand outside the model, so that trunks trained by different objectives are identical parameter for parameter, and
they are not kept when a training is over: analyzers fit probes of their own, the same for every model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.tasks.games import Game

if TYPE_CHECKING:
    from circuits.model import HookedModel


def logits_and_residual(
    model: HookedModel, tokens: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d_vocab_out"], Float[Tensor, "batch pos d_model"]]:
    """Return the logits and the residual stream after the last block, with their gradients."""
    kept: list[Tensor] = []

    def keep(resid: Tensor, hook: object) -> None:
        kept.append(resid)

    with model.hooks(fwd_hooks=[(f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", keep)]):
        logits = model(tokens)
    return logits, kept[0]


class LinearHead(nn.Module):
    """A linear map of the residual stream, which is brought to unit variance first (a norm without weights)."""

    def __init__(self, d_model: int, n_out: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, d_model, generator=generator) / math.sqrt(d_model))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_out"]:
        """Return one number for each output."""
        return F.linear(F.layer_norm(resid, resid.shape[-1:]), self.weight, self.bias)


class ActionHead(nn.Module):
    """What follows each token: a hidden layer over the residual stream and the token, then two linear maps.

    One says whether the token is legal, of every token; the other what state it leads to, of those that are asked for.
    """

    def __init__(self, d_model: int, n_tokens: int, n_out: int, generator: torch.Generator, *, width: int) -> None:
        super().__init__()
        self.resid = LinearHead(d_model, width, generator)
        self.token = nn.Parameter(torch.randn(n_tokens, width, generator=generator) / math.sqrt(2))
        self.legality = nn.Parameter(torch.randn(2, width, generator=generator) / math.sqrt(width))
        self.weight = nn.Parameter(torch.randn(n_out, width, generator=generator) / math.sqrt(width))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def hidden(self, resid: Float[Tensor, "rows d_model"], tokens: Int[Tensor, "rows k"]) -> Float[Tensor, "rows k w"]:
        """Return the hidden layer for each of some tokens."""
        return F.relu(self.resid(resid)[:, None] + self.token[tokens])

    def forward(self, hidden: Float[Tensor, "*batch w"]) -> Float[Tensor, "*batch n_out"]:
        """Return one number for each value of each feature of the state that follows."""
        return F.linear(hidden, self.weight, self.bias)

    def legal(self, hidden: Float[Tensor, "*batch w"]) -> Float[Tensor, "*batch 2"]:
        """Return one number for illegal and one for legal."""
        return F.linear(hidden, self.legality)


def feature_losses(
    logits: Float[Tensor, "rows n_values"], game: Game, features: Int[Tensor, "rows n_features"]
) -> Float[Tensor, " rows"]:
    """Return the cross-entropy of each row's state, the mean over the state's features."""
    parts = logits.split(list(game.feature_sizes), dim=1)
    losses = [F.cross_entropy(part, features[:, i], reduction="none") for i, part in enumerate(parts)]
    return torch.stack(losses).mean(0)


def read_features(logits: Float[Tensor, "rows n_values"], game: Game) -> Int[Tensor, "rows n_features"]:
    """Return the most probable value of each of the state's features."""
    return torch.stack([part.argmax(1) for part in logits.split(list(game.feature_sizes), dim=1)], 1)
