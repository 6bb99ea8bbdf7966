"""What probes read of a model: residual streams and next-token probabilities, in batches, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import bootstrap_interval
from circuits.errors import BadInput, UnsupportedModel
from circuits.model import HookedModel
from circuits.tasks.games import Game, is_game
from circuits.worldmodels.reading import NAN

TOKENS_AT_ONCE = 2**15
"""Tokens of one forward pass."""


def check_fits(model: HookedModel, game: Game, length: int | None = None) -> None:
    """Return nothing.

    Raises:
        BadInput: the model cannot read the game's tokens, give them, or read as many as a sequence has.
        UnsupportedModel: a position of the model sees those after it.
    """
    if not is_game(game):
        name = getattr(game, "name", game)
        raise BadInput(f"{name!r} is no game: world-model probes need its states and its legal moves")
    if not hasattr(model, "cfg") or not hasattr(model, "hook_dict"):
        raise BadInput(
            f"{type(model).__name__} has no TransformerLens hooks: expected a model of circuits.model or a "
            "TransformerBridge"
        )
    length = game.n_ctx if length is None else length
    cfg = model.cfg
    for name in ("d_vocab", "d_vocab_out"):
        size = getattr(cfg, name, None)
        if isinstance(size, int) and 0 <= size < game.d_vocab:
            raise BadInput(f"{name} = {size}: {game.name!r} has {game.d_vocab} tokens; take a model that has as many")
    n_ctx = getattr(cfg, "n_ctx", None)
    if isinstance(n_ctx, int) and n_ctx < length:
        raise BadInput(
            f"n_ctx = {n_ctx}: sequences of {game.name!r} have {length} tokens; take a model of a longer context, or a "
            "game with a shorter length"
        )
    if getattr(cfg, "attention_dir", "causal") != "causal":
        raise UnsupportedModel(
            "a position of this model sees later tokens: what it holds of a state cannot be told from what follows"
        )


def n_layers(model: HookedModel) -> int:
    """Return the number of blocks."""
    return int(model.cfg.n_layers)


def resid_post(layer: int) -> str:
    """Return the hook name of the residual stream after a block; -1: before the first."""
    return f"blocks.{layer}.hook_resid_post" if layer >= 0 else "blocks.0.hook_resid_pre"


def device_of(model: HookedModel) -> torch.device:
    """Return where the model's weights are."""
    return next(model.parameters()).device  # type: ignore[attr-defined,no-any-return]


def residuals(
    model: HookedModel, tokens: Int[Tensor, "n length"], layers: Sequence[int]
) -> dict[int, Float[Tensor, "n length d_model"]]:
    """Return the residual stream after each of some blocks (-1: before the first), on the CPU in float32."""
    names = {layer: resid_post(layer) for layer in layers}
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with torch.no_grad():
        for batch in tokens.split(max(1, TOKENS_AT_ONCE // max(1, tokens.shape[1]))):
            _, cache = model.run_with_cache(batch.to(device_of(model)), names_filter=list(names.values()))
            for layer, name in names.items():
                parts[layer].append(cache[name].float().cpu())
    return {layer: torch.cat(found) for layer, found in parts.items()}


def game_probabilities(logits: Float[Tensor, "*batch d_vocab_out"], d_vocab: int) -> Float[Tensor, "*batch d_vocab"]:
    """Return the probabilities of a game's tokens, on the CPU in float32.

    A model of a larger vocabulary may give some to tokens that the game has not: they add up to less than 1 then, and
    the rest is on what is illegal everywhere.
    """
    return logits.float().softmax(-1)[..., :d_vocab].cpu()


def illegal_mass(probabilities: Float[Tensor, "m d_vocab"], legal: Bool[Tensor, "m d_vocab"]) -> Float[Tensor, " m"]:
    """Return the probability of everything but the legal tokens, those that the game has not among them."""
    return (1 - (probabilities * legal).sum(1)).clamp_min(0)


def next_probabilities(
    model: HookedModel, tokens: Int[Tensor, "n length"], game: Game
) -> Float[Tensor, "n length d_vocab"]:
    """Return the probabilities of the game's tokens as the next one after each, on the CPU in float32."""
    parts = []
    with torch.no_grad():
        for batch in tokens.split(max(1, TOKENS_AT_ONCE // max(1, tokens.shape[1]))):
            parts.append(game_probabilities(model(batch.to(device_of(model))), game.d_vocab))
    return torch.cat(parts) if parts else torch.zeros(0, tokens.shape[1], game.d_vocab)


def last_probabilities(
    model: HookedModel, tokens: Int[Tensor, "n length"], lengths: Int[Tensor, " n"], game: Game
) -> Float[Tensor, "n d_vocab"]:
    """Return the probabilities of the token after the first ``lengths`` ones of each row; the rest are not seen."""
    if not len(tokens):
        return torch.zeros(0, game.d_vocab)
    rows = torch.arange(len(tokens))
    return next_probabilities(model, tokens[:, : int(lengths.max())], game)[rows, lengths - 1]


def top_sets(
    probabilities: Float[Tensor, "*batch d_vocab"], sizes: Int[Tensor, "*batch"]
) -> Bool[Tensor, "*batch d_vocab"]:
    """Return the so many most probable tokens of each row.

    Source: the top-N prediction of Li et al. 2023 (arXiv 2210.13382), section 4.
    """
    ranks = probabilities.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return ranks < sizes[..., None]


def set_errors(probabilities: Float[Tensor, "n d_vocab"], legal: Bool[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
    """Return the false positives and negatives of the top-N prediction, N the number of legal tokens.

    Source: Li et al. 2023 (arXiv 2210.13382), section 4.
    """
    return (top_sets(probabilities, legal.sum(1)) != legal).sum(1).float()


def exact_sets(
    probabilities: Float[Tensor, "n d_vocab"], legal: Bool[Tensor, "n d_vocab"], share: float = 0.5
) -> Bool[Tensor, " n"]:
    """Return where exactly the legal tokens have more than ``share`` of the probability of an even split among them."""
    accepted = probabilities > share / legal.sum(1, keepdim=True).clamp_min(1)
    return (accepted == legal).all(1)


def uniform_over(legal: Bool[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
    """Return the uniform distribution over the tokens of each set."""
    return legal.float() / legal.sum(-1, keepdim=True).clamp_min(1)


def total_variation(
    first: Float[Tensor, "*batch d_vocab"], second: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """Return half the sum of absolute differences of two distributions."""
    return (first - second).abs().sum(-1) / 2


def interval_by_sequence(values: Float[Tensor, " m"], rows: Int[Tensor, " m"]) -> tuple[float, float]:
    """Return the bootstrap interval of a mean over prefixes, by whole sequences, which alone are independent."""
    sequences, where = rows.unique(return_inverse=True)
    sums = torch.zeros(len(sequences), dtype=torch.float64).index_add_(0, where, values.double())
    return mean_interval((sums / torch.bincount(where)).tolist())


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the bootstrap interval of a mean, NaN where there are no values."""
    return bootstrap_interval(values, seed=seed, resamples=1000) if len(values) else (NAN, NAN)
