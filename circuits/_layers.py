"""The parts of the transformer in ``model.py``: its config, its hook point and its layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint as LensHookPoint

from circuits.errors import BadInput, UnknownName

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
NORMALIZATIONS = (None, "LN", "RMS")
EPS = 1e-5
MOST_LAYERS = 1024
MOST_NUMBERS = 2**32
"""Most weights and entries of masks in a model: 16 GiB of them. Far beyond, torch fails in ways that name no cause."""
ALL = slice(None)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer; sizes left as None are resolved on construction.

    Raises:
        BadInput: a size is not a positive integer, all of them make too large a model, a name is unknown, or two fields
            contradict each other.
    """

    d_vocab: int
    n_ctx: int
    n_layers: int = 1
    d_model: int = 64
    n_heads: int = 4
    d_head: int | None = None
    """None: ``d_model // n_heads``."""
    d_mlp: int | None = None
    """None: ``4 * d_model``."""
    d_vocab_out: int | None = None
    """None: ``d_vocab``."""
    act_fn: str = "relu"
    gated: bool = False
    normalization: str | None = None
    causal: bool = True
    attn_only: bool = False
    tied: bool = False
    """The unembedding is the transposed embedding."""
    attn_bias: bool = False
    mlp_bias: bool = True
    unembed_bias: bool = False
    softmax_share: float = 1.0
    """Attention is ``softmax_share * softmax + (1 - softmax_share) * uniform``."""
    uniform_weight: float | None = None
    """What ``uniform`` is at each visible position; None: 1 / number of visible positions."""
    init_std: float | None = None
    """None: ``0.8 / sqrt(d_model)``."""
    positional: bool = True

    def __post_init__(self) -> None:
        for name in ("d_vocab", "n_ctx", "n_layers", "d_model", "n_heads"):
            self._check_size(name)
        if self.d_head is None and self.d_model % self.n_heads:
            raise BadInput(
                f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}: change one or give d_head"
            )
        resolved = {"d_head": self.d_model // self.n_heads, "d_mlp": 4 * self.d_model, "d_vocab_out": self.d_vocab}
        for name, value in resolved.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            self._check_size(name)
        if self.act_fn not in ACTIVATIONS:
            raise UnknownName("activation function", str(self.act_fn), ACTIVATIONS)
        if self.normalization not in NORMALIZATIONS:
            raise BadInput(f"normalization {self.normalization!r}: expected None, 'LN' or 'RMS'")
        if not 0 <= self.softmax_share <= 1:
            raise BadInput(f"softmax_share {self.softmax_share!r}: expected a number from 0 to 1")
        for name in ("uniform_weight", "init_std"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise BadInput(f"{name} {value!r}: expected None or a finite number of at least 0")
        if self.tied and self.d_vocab_out != self.d_vocab:
            raise BadInput(f"tied: d_vocab_out {self.d_vocab_out} must equal d_vocab {self.d_vocab}")
        if (numbers := self._count()) > MOST_NUMBERS:
            names = ("d_vocab", "d_vocab_out", "n_ctx", "n_layers", "d_model", "n_heads", "d_head", "d_mlp")
            sizes = ", ".join(f"{name} {getattr(self, name)}" for name in names)
            raise BadInput(
                f"{sizes}: together {numbers:.2g} weights and mask entries: expected at most {MOST_NUMBERS:.2g}; "
                "choose smaller sizes"
            )

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadInput(f"{name} {value!r}: expected an integer of at least 1")
        most = MOST_LAYERS if name == "n_layers" else MOST_NUMBERS
        if value > most:
            raise BadInput(f"{name} {value}: expected at most {most}")

    def _count(self) -> int:
        """Return how many weights (without biases and norms, which are few) and mask entries the model has."""
        assert self.d_head is not None and self.d_mlp is not None and self.d_vocab_out is not None
        ends = self.d_vocab + (0 if self.tied else self.d_vocab_out) + (self.n_ctx if self.positional else 0)
        attention = 4 * self.n_heads * self.d_head * self.d_model + (self.n_ctx**2 if self.causal else 0)
        mlp = 0 if self.attn_only else (3 if self.gated else 2) * self.d_mlp * self.d_model
        return ends * self.d_model + self.n_layers * (attention + mlp)


class HookPoint(LensHookPoint):
    """TransformerLens's hook point, which also refuses a result of another shape.

    TransformerLens accepts any shape that broadcasts, and the numbers after it are silently wrong.
    """

    @property
    def hooked(self) -> bool:
        """Whether anybody listens or edits here."""
        return bool(self._forward_hooks or self._backward_hooks or self._forward_pre_hooks)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle made while hooks are attached must not carry them out of their context.
        clean = HookPoint()
        clean.name, clean.training = self.name, self.training
        return clean.__dict__

    def add_hook(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return TransformerLens's handle of ``hook``, whose results are checked from now on."""

        def checked(tensor: Tensor, *, hook: Any, _user: Callable[..., Any] = hook) -> Any:
            result = _user(tensor, hook=hook)
            edited = result[0] if isinstance(result, tuple) and len(result) == 1 else result
            if edited is not None and (not isinstance(edited, Tensor) or edited.shape != tensor.shape):
                got = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
                expected = f"None or a tensor of shape {tuple(tensor.shape)}"
                raise BadInput(f"the hook on {self.name!r} returned {got}: expected {expected}")
            return result

        handle = super().add_hook(checked, *args, **kwargs)
        for listed in (*self.fwd_hooks, *self.bwd_hooks):  # TransformerLens 3 returns no handle
            if listed.user_hook is checked:
                listed.user_hook = hook
        return handle


def check_tokens(tokens: object, n_ctx: int) -> None:
    """Check that something is a matrix of tokens that is no longer than the context.

    Raises:
        BadInput: it is not.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        got = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise BadInput(f"tokens are {got}: expected an int64 tensor of shape [batch, pos]")
    if not 1 <= tokens.shape[1] <= n_ctx:
        raise BadInput(f"{tokens.shape[1]} positions: expected 1 to n_ctx = {n_ctx}")


def check_ids(tokens: Tensor, d_vocab: int) -> None:
    """Check that every token is in the vocabulary.

    Raises:
        BadInput: one is not.
    """
    if tokens.numel() == 0:
        return
    low, high = (int(x) for x in tokens.aminmax())
    if low < 0 or high >= d_vocab:
        raise BadInput(f"token id {low if low < 0 else high}: expected 0 to d_vocab - 1 = {d_vocab - 1}")


class Norm(nn.Module):
    """LayerNorm or RMSNorm; by the fused kernel unless ``hook_scale`` or ``hook_normalized`` is in use."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(config.d_model))
        self.b = nn.Parameter(torch.zeros(config.d_model)) if config.normalization == "LN" else None
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return ``x`` normalised, scaled and shifted."""
        if not (self.hook_scale.hooked or self.hook_normalized.hooked):
            if self.b is not None:
                return F.layer_norm(x, self.w.shape, self.w, self.b, EPS)
            return F.rms_norm(x, self.w.shape, self.w, EPS)
        if self.b is not None:
            x = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + EPS).sqrt())
        y = self.hook_normalized(x / scale) * self.w
        return y if self.b is None else y + self.b


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the norm that the config names; without one, the identity."""
    return nn.Identity() if config.normalization is None else Norm(config)


class Attention(nn.Module):
    """Multi-head attention whose pattern is a mix of softmax and uniform weights."""

    mask: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, d_model, d_head = config.n_heads, config.d_model, config.d_head
        assert d_head is not None  # resolved by ModelConfig
        self.share, self.uniform_weight = config.softmax_share, config.uniform_weight
        self.scale, self.heads = 1 / math.sqrt(d_head), heads
        for name in "QKV":
            self.register_parameter(f"W_{name}", nn.Parameter(torch.empty(heads, d_model, d_head)))
            bias = nn.Parameter(torch.zeros(heads, d_head)) if config.attn_bias else None
            self.register_parameter(f"b_{name}", bias)
        self.W_O = nn.Parameter(torch.empty(heads, d_head, d_model))
        self.b_O = nn.Parameter(torch.zeros(d_model)) if config.attn_bias else None
        mask = torch.full((config.n_ctx, config.n_ctx), -math.inf).triu(1) if config.causal else None
        self.register_buffer("mask", mask, persistent=False)
        self.hook_q_input, self.hook_k_input, self.hook_v_input = HookPoint(), HookPoint(), HookPoint()
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z, self.hook_result = HookPoint(), HookPoint()

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], norm: nn.Module, queries: slice = ALL
    ) -> Float[Tensor, "batch query d_model"]:
        """Return what the heads together write into the residual stream, which they read through ``norm``.

        Only the positions in ``queries`` are written to; all positions are attended from there.
        """
        # Split inputs are read first, so that a cache of the norm's hooks ends with the usual shape.
        split = {name: self._read_split(name, resid, norm) for name in "QKV" if self._input_hook(name).hooked}
        x = norm(resid)
        if self.share == 0 and not split and not self._inside_hooked():
            z = self._uniform_z(x, queries)
        else:
            v = self.hook_v(split["V"] if "V" in split else self._project("V", x))
            z = _attend(self.hook_pattern(self._pattern(x, split, queries)), v)
        z = self.hook_z(z)
        if self.hook_result.hooked:
            out = self.hook_result(torch.einsum("bphe,hed->bphd", z, self.W_O)).sum(2)
            return out if self.b_O is None else out + self.b_O
        return F.linear(z.flatten(2), self.W_O.flatten(0, 1).T, self.b_O)

    def _input_hook(self, name: str) -> HookPoint:
        return getattr(self, f"hook_{name.lower()}_input")

    def _pattern(
        self, x: Float[Tensor, "batch pos d_model"], split: dict[str, Tensor], queries: slice
    ) -> Float[Tensor, "batch head query key"]:
        pattern: Tensor | None = None
        if self.share > 0 or self._scores_hooked():
            q = self.hook_q(split["Q"][:, queries] if "Q" in split else self._project("Q", x[:, queries]))
            k = self.hook_k(split["K"] if "K" in split else self._project("K", x))
            scores = _scores(q, k) * self.scale
            if self.mask is not None:
                scores = scores + self.mask[: k.shape[1], : k.shape[1]][queries]
            pattern = torch.softmax(self.hook_attn_scores(scores), dim=-1)
        if self.share < 1:
            uniform = (1 - self.share) * self._uniform(x)[queries]
            if pattern is None:
                pattern = uniform.repeat(x.shape[0], self.heads, 1, 1)
            else:
                pattern = self.share * pattern + uniform
        assert pattern is not None
        return pattern

    def _uniform_z(
        self, x: Float[Tensor, "batch pos d_model"], queries: slice
    ) -> Float[Tensor, "batch query head d_head"]:
        """Return what uniform attention mixes: positions first, then values, which are linear in them."""
        weights = self._uniform(x)[queries]
        mixed = weights @ x if len(weights) > 1 else (weights.mT * x).sum(1, keepdim=True)
        return self._project("V", mixed, scale=weights.sum(-1)[:, None])

    def _scores_hooked(self) -> bool:
        points = (self.hook_q_input, self.hook_k_input, self.hook_q, self.hook_k, self.hook_attn_scores)
        return any(point.hooked for point in points)

    def _inside_hooked(self) -> bool:
        return self._scores_hooked() or self.hook_v.hooked or self.hook_pattern.hooked

    def _project(
        self, name: str, x: Float[Tensor, "batch pos d_model"], scale: Float[Tensor, "pos 1"] | None = None
    ) -> Float[Tensor, "batch pos head d_head"]:
        weight, bias = getattr(self, f"W_{name}"), getattr(self, f"b_{name}")
        heads, d_model, d_head = weight.shape
        flat = weight.transpose(1, 2).reshape(heads * d_head, d_model)
        bias = None if bias is None else bias.flatten()
        if bias is None or scale is None:
            return F.linear(x, flat, bias).unflatten(-1, (heads, d_head))
        return (F.linear(x, flat) + scale * bias).unflatten(-1, (heads, d_head))

    def _read_split(
        self, name: str, resid: Float[Tensor, "batch pos d_model"], norm: nn.Module
    ) -> Float[Tensor, "batch pos head d_head"]:
        weight, bias = getattr(self, f"W_{name}"), getattr(self, f"b_{name}")
        copies = self._input_hook(name)(resid.unsqueeze(2).repeat(1, 1, weight.shape[0], 1))
        out = torch.einsum("bphd,hde->bphe", norm(copies), weight)
        return out if bias is None else out + bias

    def _uniform(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "query key"]:
        visible = torch.ones(x.shape[1], x.shape[1], device=x.device, dtype=x.dtype)
        if self.mask is not None:
            visible = visible.tril()
        if self.uniform_weight is not None:
            return visible * self.uniform_weight
        return visible / visible.sum(-1, keepdim=True)


def _scores(
    q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key head d_head"]
) -> Float[Tensor, "batch head query key"]:
    if q.shape[1] == 1:  # thousands of products of one row each are slow as matrix products
        return (q * k).sum(-1).mT[:, :, None]
    return q.transpose(1, 2) @ k.permute(0, 2, 3, 1)


def _attend(
    pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch key head d_head"]
) -> Float[Tensor, "batch query head d_head"]:
    if pattern.shape[2] == 1:
        return (pattern[:, :, 0].mT[..., None] * v).sum(1, keepdim=True)
    return (pattern @ v.transpose(1, 2)).transpose(1, 2)


class MLP(nn.Module):
    """A two-layer perceptron, gated or plain."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model, d_mlp = config.d_model, config.d_mlp
        assert d_mlp is not None  # resolved by ModelConfig
        self.act = config.act_fn
        self.W_in = nn.Parameter(torch.empty(d_model, d_mlp))
        self.W_gate = nn.Parameter(torch.empty(d_model, d_mlp)) if config.gated else None
        self.W_out = nn.Parameter(torch.empty(d_mlp, d_model))
        self.b_in = nn.Parameter(torch.zeros(d_mlp)) if config.mlp_bias else None
        self.b_out = nn.Parameter(torch.zeros(d_model)) if config.mlp_bias else None
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()
        if config.gated:
            self.hook_pre_linear = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the neurons' write into the residual stream."""
        act = ACTIVATIONS[self.act]
        if self.W_gate is None:
            post = act(self.hook_pre(F.linear(x, self.W_in.T, self.b_in)))
        else:
            post = act(self.hook_pre(x @ self.W_gate)) * self.hook_pre_linear(x @ self.W_in)
            post = post if self.b_in is None else post + self.b_in
        return F.linear(self.hook_post(post), self.W_out.T, self.b_out)


class Block(nn.Module):
    """Attention, then an MLP, each reading the residual stream through its norm and adding to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln1 = make_norm(config)
        self.attn = Attention(config)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        self.attn_only = config.attn_only
        if not config.attn_only:
            self.ln2 = make_norm(config)
            self.mlp = MLP(config)
            self.hook_resid_mid, self.hook_mlp_in, self.hook_mlp_out = HookPoint(), HookPoint(), HookPoint()

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], queries: slice = ALL
    ) -> Float[Tensor, "batch query d_model"]:
        """Return the residual stream after the block, at the positions in ``queries``."""
        resid = self.hook_resid_pre(resid)
        resid = resid[:, queries] + self.hook_attn_out(self.attn(resid, self.ln1, queries))
        if not self.attn_only:
            resid = self.hook_resid_mid(resid)
            # A copy of its own, so that the gradient at the MLP's input leaves out the way around the MLP.
            mlp_in = self.hook_mlp_in(resid.clone()) if self.hook_mlp_in.hooked else resid
            resid = resid + self.hook_mlp_out(self.mlp(self.ln2(mlp_in)))
        return self.hook_resid_post(resid)


class Embed(nn.Module):
    """Token embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(config.d_vocab, config.d_model))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Return each token's vector."""
        return F.embedding(tokens, self.W_E)


class PosEmbed(nn.Module):
    """Learned position embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.W_pos = nn.Parameter(torch.empty(config.n_ctx, config.d_model))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Return each position's vector, once for every sequence."""
        return self.W_pos[: tokens.shape[1]].expand(tokens.shape[0], -1, -1)


class Unembed(nn.Module):
    """The map from the residual stream to logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.d_vocab_out is not None  # resolved by ModelConfig
        self.W_U = nn.Parameter(torch.empty(config.d_model, config.d_vocab_out))
        self.b_U = nn.Parameter(torch.zeros(config.d_vocab_out)) if config.unembed_bias else None

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab_out"]:
        """Return the logits."""
        return F.linear(resid, self.W_U.T, self.b_U)


class TiedUnembed(nn.Module):
    """The transposed embedding as the map from the residual stream to logits."""

    def __init__(self, config: ModelConfig, embed: Embed) -> None:
        super().__init__()
        # In a tuple, so that the embedding is not registered as a parameter a second time.
        self._embed = (embed,)
        self.b_U = nn.Parameter(torch.zeros(config.d_vocab)) if config.unembed_bias else None

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab_out"]:
        """The transposed embedding."""
        return self._embed[0].W_E.T

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab_out"]:
        """Return the logits."""
        return F.linear(resid, self.W_U.T, self.b_U)
