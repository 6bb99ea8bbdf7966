"""A transformer that can be read and edited at every step, with TransformerLens's hook names.

It stands on TransformerLens's ``HookedRootModule``, so ``ActivationCache``, ``patching``, ``FactoredMatrix`` and
attribution patching work on it, and it converts to a ``TransformerBridge`` with equal logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.HookedRootModule import HookedRootModule

from circuits._layers import (
    ALL,
    EPS,
    LAST,
    Block,
    Embed,
    HookPoint,
    ModelConfig,
    PosEmbed,
    TiedUnembed,
    Unembed,
    make_norm,
)
from circuits.errors import BadInput, UnknownName, UnsupportedModel

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["HookPoint", "HookedModel", "ModelConfig", "Transformer", "module_of"]

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]


class HookedModel(Protocol):
    """What an analyzer needs of a model: ours and any ``TransformerBridge`` fit."""

    @property
    def cfg(self) -> Any:
        """The sizes, by TransformerLens's field names."""
        ...

    def __call__(self, tokens: Int[Tensor, "batch pos"], /) -> Float[Tensor, "batch pos d_vocab_out"]:
        """Return the logits."""
        ...

    def hooks(self, fwd_hooks: list[Hook] = ..., bwd_hooks: list[Hook] = ...) -> AbstractContextManager[Any]:
        """Return a context in which the hooks are attached."""
        ...

    def run_with_cache(self, tokens: Int[Tensor, "batch pos"], /, *, names_filter: NamesFilter = ...) -> Any:
        """Return the logits and a mapping from hook name to activation."""
        ...


class Transformer(HookedRootModule):
    """A decoder or encoder transformer with a hook point at every step of TransformerLens's.

    Args:
        config: The shape.
        seed: Decides the initial weights alone; no global random state is read or changed.

    Weight matrices start as N(0, init_std), everything else at zero (norms at one): the initialisation of
    TransformerLens's legacy ``HookedTransformer``, so that grokking times compare with papers that used it.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self._cfg = _lens_config(config)
        self.embed = Embed(config)
        self.hook_embed = HookPoint()
        if config.positional:
            self.pos_embed = PosEmbed(config)
            self.hook_pos_embed = HookPoint()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_final = make_norm(config)
        self.unembed = TiedUnembed(config, self.embed) if config.tied else Unembed(config)
        std = 0.8 / math.sqrt(config.d_model) if config.init_std is None else config.init_std
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.rpartition(".")[2].startswith("W_"):
                    parameter.normal_(0, std, generator=generator)
        self.setup()

    @property
    def cfg(self) -> Any:
        """The sizes and flags, by TransformerLens's field names."""
        weight = self.embed.W_E
        self._cfg.device, self._cfg.dtype = weight.device, weight.dtype
        return self._cfg

    def forward(
        self, tokens: Int[Tensor, "batch pos"], *, last_only: bool = False
    ) -> Float[Tensor, "batch query d_vocab_out"]:
        """Return the logits at every position, or at the last one alone.

        With ``last_only`` the last block computes queries, MLP and logits at the last position only: the same
        numbers for about half the cost of a one-layer model on three tokens. Its hooks then see that position alone.

        Raises:
            BadInput: ``tokens`` is not an integer matrix, is longer than the context, or holds an id that is not
                in the vocabulary. (On a GPU ids are looked at in eval mode only.)
        """
        self._check_shape(tokens)
        try:
            resid = self.hook_embed(self.embed(tokens))
        except IndexError:
            self._check_ids(tokens)
            raise
        if self.config.positional:
            positions = self.pos_embed(tokens)
            if self.hook_pos_embed.hooked:
                positions = self.hook_pos_embed(positions.clone())
            resid = resid + positions
        *earlier, last = self.blocks
        for block in earlier:
            resid = block(resid)
        resid = last(resid, LAST if last_only else ALL)
        return self.unembed(self.ln_final(resid))

    def _check_shape(self, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            got = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise BadInput(f"tokens are {got}: expected an int64 tensor of shape [batch, pos]")
        if not 1 <= tokens.shape[1] <= self.config.n_ctx:
            raise BadInput(f"{tokens.shape[1]} positions: expected 1 to n_ctx = {self.config.n_ctx}")
        if not self.training and tokens.device.type != "cpu":
            self._check_ids(tokens)

    def _check_ids(self, tokens: Tensor) -> None:
        if tokens.numel() == 0:
            return
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= self.config.d_vocab:
            bad = low if low < 0 else high
            raise BadInput(f"token id {bad}: expected 0 to d_vocab - 1 = {self.config.d_vocab - 1}")


def _lens_config(config: ModelConfig) -> SimpleNamespace:
    return SimpleNamespace(
        n_layers=config.n_layers,
        d_model=config.d_model,
        n_heads=config.n_heads,
        n_key_value_heads=None,
        d_head=config.d_head,
        d_mlp=None if config.attn_only else config.d_mlp,
        d_vocab=config.d_vocab,
        d_vocab_out=config.d_vocab_out,
        n_ctx=config.n_ctx,
        act_fn=config.act_fn,
        gated_mlp=config.gated,
        normalization_type=config.normalization,
        final_rms=False,
        eps=EPS,
        attn_only=config.attn_only,
        attention_dir="causal" if config.causal else "bidirectional",
        positional_embedding_type="standard" if config.positional else "none",
        tie_word_embeddings=config.tied,
        use_attn_scale=True,
        attn_scale=math.sqrt(config.d_head or 1),
        parallel_attn_mlp=False,
        use_attn_result=False,
        use_split_qkv_input=False,
        use_hook_mlp_in=False,
        use_attn_in=False,
        model_name="circuits",
        original_architecture="circuits.Transformer",
        device=None,
        dtype=torch.float32,
    )


def module_of(model: HookedModel, name: str) -> Any:
    """Return the submodule of a model by its TransformerLens name, such as ``blocks.0.ln1``.

    Raises:
        UnsupportedModel: the model has no such part.
    """
    part: Any = model
    for step in name.split("."):
        try:
            part = part[int(step)] if step.isdigit() else getattr(part, step)
        except (AttributeError, IndexError):
            raise UnsupportedModel(f"{type(model).__name__} has no module {name!r}: no {step!r} there") from None
    return part
