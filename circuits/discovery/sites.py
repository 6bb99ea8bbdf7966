"""Where a model's sources and readers are: hook names, and the weights between a reader's input and its hook."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.graph import Graph, has_position_embedding
from circuits.errors import BadInput, UnsupportedModel
from circuits.model import HookedModel, Transformer, module_of


@dataclass(frozen=True, eq=False)
class Norm:
    """The normalization in front of a reader, in closed form."""

    kind: str | None
    weight: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None
    eps: float
    frozen: bool = False
    """Whether the scale counts as a constant on the way back."""

    def standardise(
        self, x: Float[Tensor, "*batch d_model"]
    ) -> tuple[Float[Tensor, "*batch d_model"], Float[Tensor, "*batch 1"]]:
        """Return ``x`` centred and scaled, before the weight and the bias, and the scale's inverse."""
        if self.kind is None:
            return x, torch.ones_like(x[..., :1])
        centred = x - x.mean(-1, keepdim=True) if self.kind == "LN" else x
        inverse = (centred.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
        return centred * inverse, inverse

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return what the reader's weights are applied to."""
        y, _ = self.standardise(x)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, eq=False)
class Neurons:
    """The hook at an MLP's neurons, and the weights by which they write."""

    post: str
    W_out: Float[Tensor, "neuron d_model"]
    b_out: Float[Tensor, " d_model"] | None


@dataclass(frozen=True, eq=False)
class Layer:
    """One block: its hook names and attention weights."""

    resid: str
    qkv: tuple[str, str, str]
    z: str
    mlp_in: str | None
    mlp_out: str | None
    norm: Norm
    W: tuple[Float[Tensor, "_ d_model d_head"], ...]
    """W_Q, W_K, W_V; the last two have fewer heads under grouped-query attention."""
    b: tuple[Float[Tensor, "_ d_head"] | None, ...]
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, " d_model"] | None
    neurons: Neurons | None = None
    """Where the MLP's neurons are, if they are sources."""
    shares_norm: bool = False
    """Whether the MLP reads the same norm as attention does, so that ``mlp_in`` lies behind it."""

    @property
    def mlp_stream(self) -> str | None:
        """The hook of the stream in front of the MLP's norm; none where there is no MLP."""
        return self.resid if self.shares_norm and self.mlp_in is not None else self.mlp_in

    @property
    def n_mlp_sources(self) -> int:
        """How many sources the MLP is."""
        return int(self.mlp_out is not None) if self.neurons is None else len(self.neurons.W_out)

    @cached_property
    def W_back(self) -> tuple[Float[Tensor, "_ d_head d_model"], ...]:
        """The weights that carry a gradient from q, k and v to the standardised input of the norm."""
        back = [W.transpose(1, 2) for W in self.W]
        back = [W if self.norm.weight is None else W * self.norm.weight for W in back]
        if self.norm.kind == "LN":
            # centring is a projection: applied to the weights once, it need not be applied to every gradient
            back = [W - W.mean(-1, keepdim=True) for W in back]
        return tuple(back)

    @cached_property
    def offsets(self) -> tuple[Float[Tensor, "_ d_head"] | None, ...]:
        """What q, k and v are at a standardised input of zero."""
        if self.norm.bias is None:
            return self.b
        pairs = [(self.norm.bias @ W, b) for W, b in zip(self.W, self.b, strict=True)]
        return tuple(offset if b is None else offset + b for offset, b in pairs)

    def project(self, which: int, x: Float[Tensor, "*batch _ pos d_model"]) -> Float[Tensor, "*batch head pos d_head"]:
        """Return q (0), k (1) or v (2) from residual inputs that differ by head."""
        return self.project_normed(which, self.norm(x))

    def project_normed(
        self, which: int, y: Float[Tensor, "*batch _ pos d_model"]
    ) -> Float[Tensor, "*batch head pos d_head"]:
        """Return q (0), k (1) or v (2) from what the norm gives."""
        out = y @ self.W[which]
        b = self.b[which]
        return out if b is None else out + b[:, None, :]


@dataclass(frozen=True, eq=False)
class Writer:
    """Neighbouring sources that are written at one hook."""

    hook: str
    first: int
    """The number of the first of them."""
    n: int
    parts: Layer | Neurons | None = None
    """Whose heads, or which neurons, they are; None where the hook gives what the one source writes."""


@dataclass(frozen=True, eq=False)
class Sites:
    """Where each source and reader of a model is."""

    graph: Graph
    embed: str
    pos_embed: str | None
    layers: tuple[Layer, ...]
    final: str

    @cached_property
    def writers(self) -> tuple[Writer, ...]:
        """Where all sources are written, in their order."""
        found: list[tuple[str, int, Layer | Neurons | None]] = [(self.embed, 1, None)]
        if self.pos_embed is not None:
            found.append((self.pos_embed, 1, None))
        for layer in self.layers:
            found.append((layer.z, len(layer.W_O), layer))
            if layer.neurons is not None:
                found.append((layer.neurons.post, layer.n_mlp_sources, layer.neurons))
            elif layer.mlp_out is not None:
                found.append((layer.mlp_out, 1, None))
        firsts = accumulate((n for _, n, _ in found), initial=0)
        return tuple(Writer(hook, first, n, parts) for (hook, n, parts), first in zip(found, firsts, strict=False))

    @property
    def source_hooks(self) -> list[str]:
        """The hooks whose values determine every source's output."""
        return [writer.hook for writer in self.writers]

    @property
    def reader_hooks(self) -> list[str]:
        """The hooks at which gradients are taken."""
        names: list[str] = []
        for layer in self.layers:
            names += layer.qkv if layer.mlp_in is None else (*layer.qkv, layer.mlp_in)
        return [*names, self.final]

    @property
    def all_hooks(self) -> list[str]:
        """Every hook that an analysis looks at: sources, readers, and the stream in front of each attention."""
        outputs = [layer.mlp_out for layer in self.layers if layer.neurons is not None and layer.mlp_out is not None]
        return [*self.source_hooks, *outputs, *(layer.resid for layer in self.layers), *self.reader_hooks]


def sites_of(model: HookedModel, *, neurons: bool = False) -> Sites:
    """Return where each source and reader of a model is; nothing is run and nothing is changed.

    Args:
        model: The model.
        neurons: Whether the neurons of MLPs are sources, and not MLPs as a whole.

    Raises:
        UnsupportedModel: a hook or weight is missing, named in the message.
        BadInput: the model would drop activations at random.
    """
    modules = list(getattr(model, "named_modules", lambda: [])())
    training = [(name, m) for name, m in modules if m.training]
    dropping = [name for name, m in training if isinstance(m, torch.nn.Dropout) and m.p > 0]
    dropping += [
        f"{name}.{attribute}"
        for name, m in training
        for attribute in ("attention_dropout", "attn_dropout", "dropout_p")
        if isinstance(getattr(m, attribute, None), float) and getattr(m, attribute) > 0
    ]
    if dropping:
        raise BadInput(f"dropout is active in {dropping[0]}: call model.eval() first")
    graph = Graph.from_model(model, neurons=neurons)
    hooks: Mapping[str, Any] = getattr(model, "hook_dict", {})
    n_layers, attn_only = model.cfg.n_layers, bool(getattr(model.cfg, "attn_only", False))
    layers = tuple(_layer(model, hooks, i, attn_only, neurons) for i in range(n_layers))
    pos_embed = "hook_pos_embed" if has_position_embedding(model) else None
    sites = Sites(graph, "hook_embed", pos_embed, layers, f"blocks.{n_layers - 1}.hook_resid_post")
    check_hooks(model, sites.all_hooks, hooks, "is not there")
    return sites


def check_hooks(model: HookedModel, names: Iterable[str], there: Container[str], missing: str) -> None:
    """Check that all of some hooks are among those that are there.

    Raises:
        UnsupportedModel: one is not, which the message names, with what is ``missing`` of it.
    """
    lacks = [name for name in names if name not in there]
    if lacks:
        raise UnsupportedModel(f"{lacks[0]} of {type(model).__name__} {missing}: edges need what it holds")


def _layer(model: HookedModel, hooks: Mapping[str, Any], i: int, attn_only: bool, neurons: bool) -> Layer:
    block = f"blocks.{i}"
    attn = module_of(model, f"{block}.attn")
    # On a bridge hook_mlp_in fires only under a flag of the model; the input of ln2 is the same place, always there.
    places = (f"{block}.ln2.hook_in", *([f"{block}.hook_mlp_in"] if isinstance(model, Transformer) else []))
    mlp_in = next((name for name in places if name in hooks), None)
    shares_norm = mlp_in is None and bool(getattr(model.cfg, "parallel_attn_mlp", False))
    if shares_norm:  # attention's norm is the MLP's too; that it is, is checked on a run
        mlp_in = next((name for name in (f"{block}.mlp.hook_in",) if name in hooks), None)
    if not attn_only and mlp_in is None:
        raise UnsupportedModel(
            f"{block} of {type(model).__name__} has no hook at its MLP's input before the norm (ln2.hook_in or "
            f"hook_mlp_in), nor one behind a norm that it shares with attention (mlp.hook_in of a parallel block): "
            f"expected one of them"
        )
    weights = [_weight(attn, name, block) for name in ("W_Q", "W_K", "W_V", "W_O")]
    heads, kv = model.cfg.n_heads, getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
    for name, weight, expected in zip(("W_Q", "W_K", "W_V", "W_O"), weights, (heads, kv, kv, heads), strict=True):
        if weight.ndim != 3 or weight.shape[0] != expected:
            raise UnsupportedModel(
                f"{block}.attn.{name} has shape {tuple(weight.shape)}: expected one matrix for each of {expected} heads"
            )
    biases = [_bias(attn, name, weights[j].shape[::2]) for j, name in enumerate(("b_Q", "b_K", "b_V"))]
    return Layer(
        resid=f"{block}.hook_resid_pre",
        qkv=(f"{block}.attn.hook_q", f"{block}.attn.hook_k", f"{block}.attn.hook_v"),
        z=f"{block}.attn.hook_z",
        mlp_in=None if attn_only else mlp_in,
        mlp_out=None if attn_only else f"{block}.hook_mlp_out",
        norm=norm_of(model, module_of(model, f"{block}.ln1")),
        W=tuple(weights[:3]),
        b=tuple(biases),
        W_O=weights[3],
        b_O=_bias(attn, "b_O", weights[3].shape[2:]),
        neurons=_neurons(model, hooks, block) if neurons and not attn_only else None,
        shares_norm=shares_norm and not attn_only,
    )


def _neurons(model: HookedModel, hooks: Mapping[str, Any], block: str) -> Neurons:
    mlp, post = module_of(model, f"{block}.mlp"), f"{block}.mlp.hook_post"
    W_out = getattr(mlp, "W_out", None)
    if post not in hooks or not isinstance(W_out, Tensor) or W_out.shape != (model.cfg.d_mlp, model.cfg.d_model):
        raise UnsupportedModel(f"{block}.mlp of {type(model).__name__} has no hook_post or no W_out of its neurons")
    return Neurons(post, W_out.detach(), _bias(mlp, "b_out", W_out.shape[1:]))


def _weight(attn: Any, name: str, block: str) -> Tensor:
    weight = getattr(attn, name, None)
    if not isinstance(weight, Tensor):
        raise UnsupportedModel(f"{block}.attn has no {name}: expected standard attention with readable weights")
    return weight.detach()


def _bias(attn: Any, name: str, shape: torch.Size | tuple[int, ...]) -> Tensor | None:
    bias = getattr(attn, name, None)
    return bias.detach().reshape(shape) if isinstance(bias, Tensor) else None


def norm_of(model: HookedModel, ln: Any) -> Norm:
    """Return the closed form of a norm module of a model; the identity's where there is none."""
    name = str(getattr(model.cfg, "normalization_type", None) or "").upper()
    if not name or isinstance(ln, torch.nn.Identity):
        return Norm(None, None, None, 0.0)
    rms = getattr(ln, "uses_rms_norm", name.startswith("RMS"))
    weight, bias = (None, None) if name.endswith("PRE") else (getattr(ln, "w", None), getattr(ln, "b", None))
    if isinstance(weight, Tensor) and getattr(ln, "uses_weight_offset", False):
        weight = weight + 1
    return Norm(
        "RMS" if rms else "LN",
        weight.detach() if isinstance(weight, Tensor) else None,
        bias.detach() if isinstance(bias, Tensor) and not rms else None,
        float(getattr(model.cfg, "eps", 1e-5)),
    )


def check_exact(sites: Sites, store: Mapping[str, Tensor]) -> None:
    """Check on one example of a run that the sources add up to the stream and that each reader reads it as assumed.

    Raises:
        UnsupportedModel: naming the first place where the model does something else.
    """
    values = {name: tensor[:1].detach() for name, tensor in store.items()}
    checks: list[_Check] = []

    def compare(got: Tensor, expected: Tensor, name: str, what: str) -> None:
        checks.append(_Check.of(got, expected, name, what))

    stream = values[sites.embed]
    stream = stream if sites.pos_embed is None else stream + values[sites.pos_embed]
    for i, layer in enumerate(sites.layers):
        compare(values[layer.resid], stream, f"blocks.{i}.hook_resid_pre", "the sum of the sources before it")
        normed = layer.norm(values[layer.resid])
        for j, name in enumerate(layer.qkv):
            expected = layer.project_normed(j, normed[:, None]).transpose(1, 2)
            compare(values[name], expected, name, "the projection of the normalised stream")
        if layer.shares_norm and layer.mlp_in is not None:
            compare(values[layer.mlp_in], normed, layer.mlp_in, "the normalised stream that attention reads")
        before = stream
        stream = stream + values[layer.z].flatten(2) @ layer.W_O.flatten(0, 1)
        stream = stream if layer.b_O is None else stream + layer.b_O
        if layer.mlp_in is not None and not layer.shares_norm:
            seen = before if sites.graph.is_parallel(i) else stream
            compare(values[layer.mlp_in], seen, layer.mlp_in, "the sum of the sources before it")
        if layer.neurons is not None and layer.mlp_out is not None:
            written = values[layer.neurons.post] @ layer.neurons.W_out.to(stream.dtype)
            written = written if layer.neurons.b_out is None else written + layer.neurons.b_out
            compare(values[layer.mlp_out], written, layer.mlp_out, "what its neurons write")
        stream = stream if layer.mlp_out is None else stream + values[layer.mlp_out]
    compare(values[sites.final], stream, sites.final, "the sum of the sources before it")
    # read together, for each reading of a number waits for a GPU
    found = torch.stack([check.error_and_size for check in checks]).tolist()
    for check, (error, size) in zip(checks, found, strict=True):
        check.hold(error, size)


class _Check(NamedTuple):
    """How far an activation is from what it is taken to be."""

    error_and_size: Float[Tensor, " two"]
    tolerance: float
    name: str
    what: str

    @classmethod
    def of(cls, got: Tensor, expected: Tensor, name: str, what: str) -> _Check:
        if got.shape != expected.shape:
            raise UnsupportedModel(f"{name} has shape {tuple(got.shape)}: expected {tuple(expected.shape)}, {what}")
        wide = torch.promote_types(got.dtype, torch.float32)
        norms = torch.stack([(got.to(wide) - expected.to(wide)).norm(), got.to(wide).norm()])
        return cls(norms, 1e-3 if got.dtype in (torch.float32, torch.float64) else 3e-2, name, what)

    def hold(self, error: float, size: float) -> None:
        if math.isfinite(error) and error > self.tolerance * size + 1e-6:
            raise UnsupportedModel(
                f"{self.name} is not {self.what} (off by {error / size if size else math.inf:.1e} of its norm): the "
                f"model has a part that edges cannot represent, such as a norm or a scale after attention, or a hook "
                f"edits it"
            )
