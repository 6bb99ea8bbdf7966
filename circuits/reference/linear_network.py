"""A network without any nonlinearity, in which first-order effects are exact and add up."""

from __future__ import annotations

from typing import Any

import torch

from circuits.errors import BadInput
from circuits.model import ModelConfig, Transformer
from circuits.reference.weight_edges import active_edges, weight_edges
from circuits.tasks.base import Pairs

WIDTH = 4
"""Coordinates of the residual stream per token variable."""


def linear_network(
    *, n_pairs: int = 64, seed: int = 0, weight_seed: int = 0, d_vocab: int = 7, n_layers: int = 2, n_heads: int = 3
) -> tuple[Transformer, Pairs, frozenset[tuple[str, str]], frozenset[tuple[str, str]], bool, dict[str, Any]]:
    """Return an attention-only model with uniform attention and no normalization, pairs, and its true edges.

    Of each layer one head passes on what the answer needs; the others write into coordinates that nothing reads. The
    effect of ablating a set of edges is then the sum of its edges' effects along disjoint paths, and a gradient is
    the same everywhere.

    Args:
        n_pairs: Number of pairs.
        seed: Of the pairs.
        weight_seed: Of the weights.
        d_vocab: Number of tokens.
        n_layers: Layers.
        n_heads: Heads per layer.
    """
    if n_pairs < 1:
        raise BadInput(f"n_pairs = {n_pairs}: expected at least 1")
    generator = torch.Generator().manual_seed(weight_seed)
    d_model = WIDTH * (n_layers + 2)
    config = ModelConfig(
        d_vocab=d_vocab, n_ctx=4, n_layers=n_layers, d_model=d_model, n_heads=n_heads, d_head=WIDTH,
        attn_only=True, softmax_share=0.0,
    )  # fmt: skip
    model = Transformer(config, seed=weight_seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[:, :WIDTH] = torch.randn(d_vocab, WIDTH, generator=generator)
        blocks: list[Any] = list(model.blocks)
        for layer, block in enumerate(blocks):
            used = layer % n_heads
            for head in range(n_heads):
                start = WIDTH * layer if head == used else 0
                to = WIDTH * (layer + 1 if head == used else n_layers + 1)
                block.attn.W_V[head, start : start + WIDTH] = torch.randn(WIDTH, WIDTH, generator=generator)
                block.attn.W_O[head, :, to : to + WIDTH] = torch.randn(WIDTH, WIDTH, generator=generator)
        last = WIDTH * n_layers
        model.unembed.W_U[last : last + WIDTH] = torch.randn(WIDTH, d_vocab, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt = (torch.randint(d_vocab, (n_pairs, 4), generator=generator) for _ in range(2))
    position = torch.full((n_pairs,), 3)
    with torch.no_grad():
        gap = (model(clean) - model(corrupt))[:, 3]
    pairs = Pairs(clean, corrupt, position, gap.argmax(1), gap.argmin(1), "every token")
    edges = weight_edges(model)
    return model, pairs, edges, active_edges(model, pairs, edges), False, {"made": "by hand"}
