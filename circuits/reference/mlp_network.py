"""Networks without attention that read two operands, with the hooks that tests of mechanisms need."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

from circuits.errors import BadInput, UnknownName

JOINED = ("sum", "concatenated")
Layer = tuple[Float[Tensor, "_ _"], Float[Tensor, " _"]]


class _Mlp(nn.Module):
    """``relu(x W_in + b_in) W_out``; ``W_out`` is the identity, since these networks have no residual stream."""

    W_out: Tensor

    def __init__(self, w_in: Tensor, b_in: Tensor) -> None:
        super().__init__()
        self.W_in, self.b_in = nn.Parameter(w_in.clone()), nn.Parameter(b_in.clone())
        self.register_buffer("W_out", torch.eye(len(b_in), dtype=w_in.dtype))
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        post: Tensor = self.hook_post(torch.relu(self.hook_pre(x @ self.W_in + self.b_in)))
        return post


class _Block(nn.Module):
    def __init__(self, w_in: Tensor, b_in: Tensor) -> None:
        super().__init__()
        self.mlp = _Mlp(w_in, b_in)
        self.hook_mlp_out = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.hook_mlp_out(self.mlp(x))
        return out


class MlpNetwork(HookedRootModule):
    """A network that adds or concatenates the embeddings of two tokens and applies ReLU layers and an unembedding.

    It has ``hook_embed`` [batch, 2, d_model] and, at the one position of the answer, ``blocks.i.mlp.hook_pre``,
    ``hook_post`` and ``hook_mlp_out``; no attention and no residual stream. Tests of mechanisms read it as they read a
    transformer of two tokens; circuit discovery does not, since there are no edges to choose from.

    Args:
        embedding: one row per token.
        layers: weights [in, out] and biases of the ReLU layers.
        unembedding: from the last layer to the logits.
        joined: ``sum`` or ``concatenated``.

    Raises:
        BadInput: the sizes do not fit together.
        UnknownName: ``joined`` is neither of the two.

    Source: the linear models of Zhong et al. 2023 (arXiv 2306.17844), appendix; repository fjzzq2002/pizza,
    train-linear.py (models A and B add, model D concatenates).
    """

    def __init__(
        self,
        embedding: Float[Tensor, "d_vocab d_model"],
        layers: Sequence[Layer],
        unembedding: Float[Tensor, "d_mlp d_vocab_out"],
        *,
        joined: str = "sum",
    ) -> None:
        super().__init__()
        if joined not in JOINED:
            raise UnknownName("way of joining operands", joined, JOINED)
        width = embedding.shape[1] * (1 if joined == "sum" else 2)
        for w_in, b_in in layers:
            if w_in.shape != (width, len(b_in)):
                raise BadInput(f"a layer has weights {tuple(w_in.shape)}: expected ({width}, {len(b_in)})")
            width = len(b_in)
        if len(unembedding) != width:
            raise BadInput(f"the unembedding reads {len(unembedding)} values: the last layer has {width}")
        self.joined = joined
        self.W_E, self.W_U = nn.Parameter(embedding.clone()), nn.Parameter(unembedding.clone())
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(_Block(*layer) for layer in layers)
        self.cfg = SimpleNamespace(
            n_layers=len(layers),
            d_model=embedding.shape[1],
            d_vocab=len(embedding),
            d_vocab_out=unembedding.shape[1],
            n_ctx=2,
            n_heads=0,
            act_fn="relu",
            normalization_type=None,
            device=embedding.device,
            dtype=embedding.dtype,
        )
        self.setup()

    def forward(self, tokens: Int[Tensor, "batch 2"]) -> Float[Tensor, "batch 1 d_vocab_out"]:
        """Return the logits at the one position of the answer.

        Raises:
            BadInput: there are not two tokens.
        """
        if tokens.ndim != 2 or tokens.shape[1] != 2:
            raise BadInput(f"tokens have shape {tuple(tokens.shape)}: expected [batch, 2], the two operands")
        first, second = self.hook_embed(self.W_E[tokens]).unbind(1)
        x = first + second if self.joined == "sum" else torch.cat([first, second], dim=1)
        x = x[:, None]
        for block in self.blocks:
            x = block(x)
        return x @ self.W_U
