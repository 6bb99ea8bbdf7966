"""A model as functions of its residual stream that can be run from any block on, checked against the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from circuits.discovery.activations import Store, activations_at
from circuits.discovery.sites import Sites
from circuits.errors import UnsupportedModel
from circuits.model import HookedModel, Transformer, module_of

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Rotation:
    """A rotary position embedding: x turns to x * cos + x[perm] * sin, coordinate by coordinate."""

    cos: Float[Tensor, "pos d_head"]
    sin: Float[Tensor, "pos d_head"]
    perm: Int[Tensor, " d_head"]

    def __call__(self, x: Float[Tensor, "*batch pos d_head"], at: slice = ALL) -> Float[Tensor, "*batch pos d_head"]:
        """Return ``x`` turned as at the positions ``at``."""
        at = slice(x.shape[-2]) if at == ALL else at
        return x * self.cos[at] + x[..., self.perm] * self.sin[at]


@dataclass(frozen=True, eq=False)
class Pattern:
    """How a block's heads get from queries, keys and values to what they read: softmax, or a mix with uniform."""

    scale: float
    causal: bool
    share: float = 1.0
    uniform: Float[Tensor, "pos pos"] | None = None
    rotation: Rotation | None = None

    def turn(self, x: Float[Tensor, "*batch pos d_head"], at: slice = ALL) -> Float[Tensor, "*batch pos d_head"]:
        """Return queries or keys with their position's rotation."""
        return x if self.rotation is None else self.rotation(x, at)

    def weights(
        self, q: Float[Tensor, "*batch query d_head"], k: Float[Tensor, "*batch pos d_head"], at: slice = ALL
    ) -> Float[Tensor, "*batch query pos"]:
        """Return the attention pattern of turned queries and keys."""
        n = k.shape[-2]
        scores = (q @ k.transpose(-1, -2)) * self.scale
        if self.causal:
            scores = scores + torch.full((n, n), -torch.inf, device=q.device, dtype=q.dtype).triu(1)[at]
        pattern = scores.softmax(-1)
        return pattern if self.uniform is None else self.share * pattern + (1 - self.share) * self.uniform[:n, :n][at]

    def read(
        self,
        q: Float[Tensor, "row head query d_head"],
        k: Float[Tensor, "row head pos d_head"],
        v: Float[Tensor, "row head pos d_head"],
        at: slice = ALL,
    ) -> Float[Tensor, "row head query d_head"]:
        """Return what each head reads at the queries ``at``, from turned queries and keys."""
        if self.uniform is None and (at == ALL or not self.causal or at == slice(k.shape[2] - 1, k.shape[2])):
            # a query at the last position sees every key
            causal = self.causal and at == ALL
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.scale)
        return self.weights(q, k, at) @ v


@dataclass(frozen=True, eq=False)
class Blocks:
    """A model in parts: every function takes and returns tensors of shape [row, pos, ...] and changes nothing."""

    model: HookedModel
    sites: Sites
    patterns: tuple[Pattern, ...]

    @cached_property
    def parallel(self) -> bool:
        """Whether an MLP reads what its own block's attention reads."""
        return bool(getattr(self.model.cfg, "parallel_attn_mlp", False))

    @property
    def causal(self) -> bool:
        """Whether no position sees a later one."""
        return all(pattern.causal for pattern in self.patterns)

    @cached_property
    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """W_Q, W_K and W_V of each layer as one matrix, and their biases."""
        out: list[tuple[Tensor, Tensor | None]] = []
        for layer in self.sites.layers:
            weight = torch.cat([W.transpose(1, 2).flatten(0, 1) for W in layer.W])
            if all(b is None for b in layer.b):
                out.append((weight, None))
                continue
            biases = [W.new_zeros(W.shape[::2]) if b is None else b for W, b in zip(layer.W, layer.b, strict=True)]
            out.append((weight, torch.cat([b.flatten() for b in biases]).to(weight)))
        return out

    def norm(self, i: int, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return what the attention of block ``i`` reads of the stream ``x``."""
        norm, shape = self.sites.layers[i].norm, x.shape[-1:]
        if norm.kind is None:
            return x
        if norm.kind == "LN":
            return F.layer_norm(x, shape, norm.weight, norm.bias, norm.eps)
        y = F.rms_norm(x, shape, norm.weight, norm.eps)
        return y if norm.bias is None else y + norm.bias

    def project(
        self, i: int, x: Float[Tensor, "row pos d_model"], which: tuple[int, ...] = (0, 1, 2), at: slice = ALL
    ) -> list[Float[Tensor, "row _ pos d_head"]]:
        """Return q (0), k (1) and v (2) of block ``i``, or some, by head and turned, from what ``norm`` gives."""
        weight, bias = self._projections[i]
        sizes = [W.shape[0] * W.shape[2] for W in self.sites.layers[i].W]
        first, last = sum(sizes[: which[0]]), sum(sizes[: which[-1] + 1])
        y = F.linear(x, weight[first:last], None if bias is None else bias[first:last])
        d_head = self.sites.layers[i].W[0].shape[2]
        parts = [p.unflatten(-1, (-1, d_head)).transpose(1, 2) for p in y.split([sizes[j] for j in which], -1)]
        return [p if j == 2 else self.patterns[i].turn(p, at) for j, p in zip(which, parts, strict=True)]

    def project_each(
        self, i: int, which: int, heads: list[int], x: list[Float[Tensor, "set batch pos d_model"]], at: slice = ALL
    ) -> Float[Tensor, "head set batch pos d_head"]:
        """Return q (0), k (1) or v (2) of some heads of block ``i``, turned, each from a stream of its own."""
        layer = self.sites.layers[i]
        y = self.norm(i, torch.stack(x))
        out = torch.bmm(y.flatten(1, 3), layer.W[which][heads].to(y.dtype)).view(*y.shape[:-1], -1)
        b = layer.b[which]
        out = out if b is None else out + b[heads][:, None, None, None]
        return out if which == 2 else self.patterns[i].turn(out, at)

    def share(self, i: int, k: Float[Tensor, "row _ pos d_head"]) -> Float[Tensor, "row head pos d_head"]:
        """Return keys or values once per query head."""
        group = self.group(i)
        return k if group == 1 else k.repeat_interleave(group, dim=1)

    def group(self, i: int) -> int:
        """Number of query heads that share a key head."""
        W_Q, W_K, _ = self.sites.layers[i].W
        return W_Q.shape[0] // W_K.shape[0]

    def folds(self, i: int, at: slice, n: int) -> bool:
        """Whether ``at`` is one position of ``n`` that sees every key, and no rotation parts keys from the stream.

        What is read there needs neither keys nor values of the whole stream: ``key_directions`` and ``read_by_one``.
        Where heads share keys, these are few, and as cheap.
        """
        pattern = self.patterns[i]
        one = at.start is not None and at.stop == at.start + 1 and (not pattern.causal or at.stop == n)
        return one and pattern.rotation is None and self.group(i) == 1

    def key_directions(self, i: int, q: Float[Tensor, "row head 1 d_head"]) -> Float[Tensor, "row head d_model"]:
        """Return the directions of the normalised stream that a query at one position attends to.

        q . (x W_K + b_K) is x . (W_K q), up to a constant that softmax does not see: a product per head and position
        instead of a key.
        """
        W_K = self.sites.layers[i].W[1]
        return torch.einsum("rhd,hmd->rhm", q[:, :, 0], W_K.to(q.dtype))

    def pattern_of_one(
        self, i: int, directions: Float[Tensor, "row head d_model"], y: Float[Tensor, "row pos d_model"], at: slice
    ) -> Float[Tensor, "row head pos"]:
        """Return how a query at the one position ``at``, which sees every key, attends to ``y``."""
        pattern = self.patterns[i]
        weights = (torch.bmm(directions, y.transpose(1, 2)) * pattern.scale).softmax(-1)
        if pattern.uniform is None:
            return weights
        n = y.shape[1]
        return pattern.share * weights + (1 - pattern.share) * pattern.uniform[:n, :n][at]

    def read_by_one(
        self, i: int, weights: Float[Tensor, "row head pos"], y: Float[Tensor, "row pos d_model"]
    ) -> Float[Tensor, "row head 1 d_head"]:
        """Return what a query with these weights reads of ``y``: the values' projection is applied to their mean."""
        layer = self.sites.layers[i]
        z = torch.einsum("rhm,hmd->rhd", torch.bmm(weights, y), layer.W[2].to(y.dtype))
        if layer.b[2] is not None:
            z = z + weights.sum(-1, keepdim=True) * layer.b[2].to(y.dtype)
        return z[:, :, None]

    def write(self, i: int, z: Float[Tensor, "row head pos d_head"]) -> Float[Tensor, "row pos d_model"]:
        """Return what the attention of block ``i`` adds to the stream."""
        layer = self.sites.layers[i]
        return F.linear(z.transpose(1, 2).flatten(2), layer.W_O.flatten(0, 1).T, layer.b_O)

    def mlp(self, i: int, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """Return what the MLP of block ``i`` adds to the stream where it reads ``x``."""
        block = module_of(self.model, f"blocks.{i}")
        return block.mlp(self.norm(i, x) if self.sites.layers[i].shares_norm else block.ln2(x))

    def has_mlp(self, i: int) -> bool:
        """Whether block ``i`` has an MLP."""
        return self.sites.layers[i].mlp_out is not None

    def block(self, i: int, x: Float[Tensor, "row pos d_model"], at: slice = ALL) -> Float[Tensor, "row _ d_model"]:
        """Return the stream after block ``i``, at the positions ``at``, where ``x`` is the stream before it."""
        y = self.norm(i, x)
        middle = x[:, at] + self.write(i, self._read(i, y, at))
        if not self.has_mlp(i):
            return middle
        return middle + self.mlp(i, x[:, at] if self.parallel else middle)

    def _read(self, i: int, y: Float[Tensor, "row pos d_model"], at: slice) -> Float[Tensor, "row head _ d_head"]:
        """Return what the heads of block ``i`` read at the positions ``at`` of the normalised stream ``y``."""
        if at == ALL:
            q, k, v = self.project(i, y)
        else:
            (q,) = self.project(i, y[:, at], (0,), at)
            if self.folds(i, at, y.shape[1]):
                return self.read_by_one(i, self.pattern_of_one(i, self.key_directions(i, q), y, at), y)
            k, v = self.project(i, y, (1, 2))
        return self.patterns[i].read(q, self.share(i, k), self.share(i, v), at)

    def finish(self, i: int, x: Float[Tensor, "row pos d_model"], position: int) -> Float[Tensor, "row d_vocab_out"]:
        """Return the logits at ``position``, where ``x`` is the stream before block ``i`` (after the last: there)."""
        last = len(self.sites.layers) - 1
        for j in range(i, last):
            x = self.block(j, x)
        if i <= last:
            x = self.block(last, x, slice(position, position + 1))
        return self.logits(x)[:, 0]

    def logits(self, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_vocab_out"]:
        """Return the logits of a final stream."""
        return module_of(self.model, "unembed")(module_of(self.model, "ln_final")(x))


def blocks_of(model: HookedModel, sites: Sites, tokens: Int[Tensor, "batch pos"]) -> Blocks:
    """Return a model in parts, each of which gives on ``tokens`` what the model itself gives.

    Raises:
        UnsupportedModel: a part is something else, such as an attention that is not a softmax of scaled products; the
            message names it.
    """
    points: Mapping[str, Any] = getattr(model, "hook_dict", {})
    rotary = [f"blocks.{i}.attn.hook_{name}" for i in range(len(sites.layers)) for name in ("cos", "sin")]
    values, logits = activations_at(model, [*sites.all_hooks, *(name for name in rotary if name in points)], tokens)
    n = tokens.shape[1]
    with torch.no_grad():
        if isinstance(model, Transformer):
            patterns = [_own_pattern(block.attn, values[sites.embed], n) for block in model.blocks]
        else:
            patterns = [_found_pattern(model, sites, i, values) for i in range(len(sites.layers))]
        blocks = Blocks(model, sites, tuple(patterns))
        streams = [*(values[layer.resid] for layer in sites.layers), values[sites.final]]
        for i, (before, after) in enumerate(pairwise(streams)):
            one = slice(n - 1, n)
            for at in (ALL, one):
                if not same(blocks.block(i, before, at), after[:, at]):
                    raise UnsupportedModel(f"blocks.{i} does more than attention and an MLP that add to the stream")
        if not same(blocks.logits(streams[-1]), logits):
            raise UnsupportedModel("the logits are not the unembedding of the final norm")
    return blocks


def same(got: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree as far as their precision lets them."""
    if got.shape != expected.shape:
        return False
    tolerance = 1e-4 if got.dtype in (torch.float32, torch.float64) else 3e-2
    difference = (got.double() - expected.double()).norm()
    return not bool(difference > tolerance * expected.double().norm() + 1e-6)


def _own_pattern(attn: Any, like: Tensor, n: int) -> Pattern:
    if attn.share == 1:
        return Pattern(attn.scale, attn.mask is not None)
    visible = like.new_ones(n, n)
    visible = visible if attn.mask is None else visible.tril()
    weight = attn.uniform_weight
    uniform = visible / visible.sum(-1, keepdim=True) if weight is None else visible * weight
    return Pattern(attn.scale, attn.mask is not None, attn.share, uniform)


def _found_pattern(model: HookedModel, sites: Sites, i: int, values: Store) -> Pattern:
    """Return the pattern that turns this block's queries, keys and values into what its heads read."""
    layer = sites.layers[i]
    q, k, v = (values[name].transpose(1, 2) for name in layer.qkv)
    group, (n, d_head) = q.shape[1] // k.shape[1], q.shape[2:]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scales = [d_head**-0.5, 1.0]
    given = getattr(model.cfg, "attn_scale", None)
    if isinstance(given, float | int) and given > 0:
        scales.append(1 / given)
    for rotation, causal, scale in product(_rotations(model, i, values, n, d_head), (True, False), scales):
        pattern = Pattern(scale, causal, rotation=rotation)
        if same(pattern.read(pattern.turn(q), pattern.turn(k), v).transpose(1, 2), values[layer.z]):
            return pattern
    raise UnsupportedModel(f"the attention of blocks.{i} is not a softmax of scaled, perhaps rotated, products")


def _rotations(model: HookedModel, i: int, values: Store, n: int, d_head: int) -> list[Rotation | None]:
    """The ways in which a rotary embedding may be laid out: in halves, or in neighbouring coordinates."""
    if f"blocks.{i}.attn.hook_cos" in values:
        cos, sin = (
            values[f"blocks.{i}.attn.hook_{name}"].reshape(-1, n, values[f"blocks.{i}.attn.hook_{name}"].shape[-1])[0]
            for name in ("cos", "sin")
        )
        return [*(_rotation(cos, sin, d_head, neighbours) for neighbours in (False, True)), None]
    if getattr(model.cfg, "positional_embedding_type", None) != "rotary":
        return [None]
    # GPT-J turns by itself and shows no angles: they are those of the paper (Su et al. 2021, arXiv 2104.09864)
    turned = getattr(model.cfg, "rotary_dim", None) or d_head
    like = values[f"blocks.{i}.hook_resid_pre"]
    base = float(getattr(model.cfg, "rotary_base", None) or 10_000)
    frequency = base ** (-torch.arange(0, turned, 2, device=like.device) / turned)
    angle = torch.arange(n, device=like.device)[:, None] * frequency
    pairs = {False: torch.cat([angle, angle], 1), True: angle.repeat_interleave(2, 1)}
    laid = [_rotation(x.cos().to(like), x.sin().to(like), d_head, neighbours) for neighbours, x in pairs.items()]
    return [*laid, None]


def _rotation(
    cos: Float[Tensor, "pos turned"], sin: Float[Tensor, "pos turned"], d_head: int, neighbours: bool
) -> Rotation:
    """A rotation of the first coordinates of a head, each with its neighbour or with that half of them away."""
    turned = cos.shape[-1]
    index = torch.arange(d_head, device=cos.device)
    first, rest = index[:turned], d_head - turned
    partner = first ^ 1 if neighbours else (first + turned // 2) % turned
    signed = torch.where(first % 2 == 0 if neighbours else first < turned // 2, -sin, sin)
    return Rotation(F.pad(cos, (0, rest), value=1.0), F.pad(signed, (0, rest)), torch.cat([partner, index[turned:]]))
