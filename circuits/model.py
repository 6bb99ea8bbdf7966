"""A transformer that can be read and edited at every step, with TransformerLens's hook names.

It stands on TransformerLens's ``HookedRootModule``, so ``ActivationCache``, ``patching``, ``FactoredMatrix`` and
attribution patching work on it, and it converts to a ``TransformerBridge`` with equal logits.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.HookedRootModule import HookedRootModule

from circuits import _convert, _io
from circuits._layers import (
    ALL,
    EPS,
    Block,
    Embed,
    HookPoint,
    ModelConfig,
    PosEmbed,
    TiedUnembed,
    Unembed,
    check_ids,
    check_tokens,
    make_norm,
)
from circuits.errors import BadInput, CorruptRun, IncompatibleRun, UnknownName, UnsupportedModel

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = [
    "HookPoint",
    "HookedModel",
    "ModelConfig",
    "Transformer",
    "from_transformer_lens",
    "load",
    "module_of",
    "save",
]

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]
FORMAT = "circuits.model/1"
# Hook points that TransformerLens leaves out of a cache unless the flag is set: one more axis, of heads, each.
FLAGS = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
}


@runtime_checkable
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


def _stacked(part: str, name: str) -> Any:
    """Return a property that stacks one weight over layers, an absent bias as zeros."""

    def stack(self: Transformer) -> Tensor:
        parts = [getattr(block, part) for block in self.blocks]
        weights = [getattr(module, name) for module in parts]
        if weights[0] is None:
            weight = getattr(parts[0], {"b_O": "W_O", "b_out": "W_out"}.get(name, "W_in" if part == "mlp" else "W_Q"))
            shape = weight.shape[-1:] if name in ("b_O", "b_in", "b_out") else (weight.shape[0], weight.shape[-1])
            return weight.new_zeros(len(parts), *shape)
        return torch.stack(weights)

    return property(stack, doc=f"``{name}`` of every layer, stacked.")


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

    def __getstate__(self) -> dict[str, Any]:
        # The hook points leave their hooks behind, so a copy stands in no hook context.
        return {**self.__dict__, "context_level": 0, "is_caching": False}

    W_Q, W_K, W_V, W_O = (_stacked("attn", f"W_{m}") for m in "QKVO")
    b_Q, b_K, b_V, b_O = (_stacked("attn", f"b_{m}") for m in "QKVO")
    W_in, W_gate, W_out = (_stacked("mlp", name) for name in ("W_in", "W_gate", "W_out"))
    b_in, b_out = _stacked("mlp", "b_in"), _stacked("mlp", "b_out")
    W_E = property(lambda self: self.embed.W_E)
    W_pos = property(lambda self: self.pos_embed.W_pos)
    W_U = property(lambda self: self.unembed.W_U)

    @property
    def b_U(self) -> Float[Tensor, " d_vocab_out"]:
        """The unembedding's bias; zeros where there is none."""
        bias = self.unembed.b_U
        return self.W_U.new_zeros(self.W_U.shape[1]) if bias is None else bias

    @property
    def cfg(self) -> Any:
        """The sizes and flags, by TransformerLens's field names."""
        weight = self.embed.W_E
        self._cfg.device, self._cfg.dtype = weight.device, weight.dtype
        return self._cfg

    def forward(
        self, tokens: Int[Tensor, "batch pos"], *, last: int | None = None
    ) -> Float[Tensor, "batch query d_vocab_out"]:
        """Return the logits at every position, or at the ``last`` positions alone.

        With ``last`` the last block computes queries, MLP and logits at those positions only: the same numbers for
        about half the cost of a one-layer model on three tokens. Its hooks then see those positions alone.

        Raises:
            BadInput: ``tokens`` is not an integer matrix, is longer than the context, or holds an id that is not
                in the vocabulary. (On a GPU ids are looked at in eval mode only.) ``last`` is less than 1.
        """
        check_tokens(tokens, self.config.n_ctx)
        if not self.training and tokens.device.type != "cpu":
            check_ids(tokens, self.config.d_vocab)
        if last is not None and last < 1:
            raise BadInput(f"last = {last}: expected None or a number of positions of at least 1")
        try:
            resid = self.hook_embed(self.embed(tokens))
        except IndexError:
            check_ids(tokens, self.config.d_vocab)
            raise
        if self.config.positional:
            positions = self.pos_embed(tokens)
            if self.hook_pos_embed.hooked:
                positions = self.hook_pos_embed(positions.clone())
            resid = resid + positions
        *earlier, final = self.blocks
        for block in earlier:
            resid = block(resid)
        resid = final(resid, ALL if last is None else slice(-last, None))
        return self.unembed(self.ln_final(resid))

    def add_hook(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a hook that would stay: TransformerLens's method has no place in a model whose hooks never leak.

        Raises:
            BadInput: always.
        """
        raise BadInput("hooks of this model live in a context alone: with model.hooks(fwd_hooks=[(name, hook)]): ...")

    add_perma_hook = add_hook

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[Hook] = (),
        bwd_hooks: Sequence[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Transformer]:
        """Return a context in which the hooks are attached; they are gone after it, whatever happens in it.

        Raises:
            UnknownName: a name is no hook point.
            BadInput: a filter on names matches none; hooks are to outlive the context; or, from the forward, a hook
                returned another shape.
        """
        if not reset_hooks_end:
            raise BadInput("reset_hooks_end = False: hooks of this model never outlive their context; stay within it")
        for name, _ in (*fwd_hooks, *bwd_hooks):
            self._matching(name)
        with super().hooks(list(fwd_hooks), list(bwd_hooks), reset_hooks_end, clear_contexts):
            yield self

    def remove_all_hook_fns(self, *args: Any, **kwargs: Any) -> None:
        """Remove hooks as TransformerLens does, and pass by the points that have none: that is most of the time."""
        for point in self.hook_points():
            if point.fwd_hooks or point.bwd_hooks:
                point.remove_hooks(*args, **kwargs)

    def run_with_cache(
        self,
        *args: Any,
        names_filter: NamesFilter = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Return the logits and an ``ActivationCache`` of the hook points that ``names_filter`` chooses.

        Without a filter these are TransformerLens's own: all but the inputs split by head, each head's result and
        the MLP's input, which are there once they are named (or the model's flag for them is set).

        Raises:
            UnknownName: a name is no hook point.
            BadInput: the filter matches nothing.
        """
        names = self._matching(names_filter)
        logits, cache = super().run_with_cache(*args, names_filter=names, remove_batch_dim=remove_batch_dim, **kwargs)
        if return_cache_object:
            cache = ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)
        return logits, cache

    def _matching(self, names_filter: NamesFilter) -> list[str]:
        if names_filter is None:
            flags = ((name, FLAGS.get(name.rpartition(".")[2])) for name in self.hook_dict)
            return [name for name, flag in flags if flag is None or getattr(self._cfg, flag)]
        if callable(names_filter):
            names = [name for name in self.hook_dict if names_filter(name)]
        else:
            names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
            for name in names:
                if name not in self.hook_dict:
                    raise UnknownName("hook point", name, difflib.get_close_matches(name, self.hook_dict, 6, cutoff=0))
        if not names:
            raise BadInput(f"the filter {names_filter!r} matches no hook point: model.hook_dict lists them")
        return names

    def set_use_attn_result(self, use: bool) -> None:
        """Have ``run_with_cache`` without a filter include each head's result."""
        self._cfg.use_attn_result = use

    def set_use_split_qkv_input(self, use: bool) -> None:
        """Have ``run_with_cache`` without a filter include the inputs of q, k and v split by head."""
        self._cfg.use_split_qkv_input = use

    def set_use_hook_mlp_in(self, use: bool) -> None:
        """Have ``run_with_cache`` without a filter include each MLP's input."""
        self._cfg.use_hook_mlp_in = use

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Return the sum of the biases that the stream holds at ``layer``; its attention's too for its MLP."""
        total = self.b_O[: layer + mlp_input].sum(0)
        return total + self.b_out[:layer].sum(0) if include_mlp_biases and not self.config.attn_only else total

    def tokens_to_residual_directions(self, tokens: int | Int[Tensor, "*shape"]) -> Float[Tensor, "*shape d_model"]:
        """Return each token's direction in the residual stream: its column of ``W_U``."""
        return self.W_U.T[tokens]

    def to_bridge(self) -> TransformerBridge:
        """Return a native ``TransformerBridge`` with equal logits. A tied unembedding becomes a copy.

        Raises:
            UnsupportedModel: the model has a part that a native bridge lacks, or TransformerLens is older than 4.
        """
        state = self.state_dict() | {"unembed.W_U": self.W_U}
        return _convert.to_bridge(self.cfg, state, softmax_share=self.config.softmax_share).train(self.training)


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


def from_transformer_lens(
    state_dict: Mapping[str, Any],
    *,
    act_fn: str,
    normalization: str | None,
    n_heads: int | None = None,
    causal: bool = True,
    softmax_share: float = 1.0,
    uniform_weight: float | None = None,
) -> Transformer:
    """Return a model, in eval mode, with the weights of a TransformerLens state dict of any release.

    Sizes and biases follow from the shapes; what no weight shows is asked for. A matrix that is square, and so
    fits today's orientation and the older releases', is read as the other matrices of the dict are.

    Args:
        state_dict: weights by TransformerLens name; buffers (``mask``, ``IGNORE``) are left out.
        act_fn: "relu", "gelu", "gelu_new" or "silu".
        normalization: None, "LN" or "RMS".
        n_heads: if given, the number of heads that the weights must have.
        causal: whether a position sees only itself and those before it.
        softmax_share: the share of softmax in the attention pattern; the rest is uniform.
        uniform_weight: what uniform is per visible position; None: 1 / number of visible positions.

    Raises:
        BadInput: a key is unknown, a weight is missing, or shapes contradict each other.
        CorruptRun: a weight is not finite.
    """
    sizes, state = _convert.read_state_dict(state_dict, normalization=normalization, n_heads=n_heads)
    config = ModelConfig(
        **sizes,
        act_fn=act_fn,
        normalization=normalization,
        causal=causal,
        softmax_share=softmax_share,
        uniform_weight=uniform_weight,
    )
    model = Transformer(config)
    model.to(state["embed.W_E"].dtype)
    model.load_state_dict(_convert.complete(state, model.state_dict()))
    return model.eval()


def save(model: Transformer, path: Path | str) -> str:
    """Write a model with its config to one safetensors file, atomically, and return the file's sha256.

    Raises:
        StorageError: the file cannot be written.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    config = _io.canonical_json(model.config)
    facts = {"format": FORMAT, "config": config, "sha256": _digest(config, tensors)}
    # one entry: safetensors writes several in an order that differs from process to process
    metadata = {"circuits": json.dumps(facts, sort_keys=True)}
    return _io.atomic_write(path, safetensors.torch.save(tensors, metadata))


def load(path: Path | str, *, sha256: str | None = None) -> Transformer:
    """Return the model that ``save`` wrote, in eval mode, on the CPU.

    Raises:
        CorruptRun: the file is absent, truncated or altered, is no such file, or holds a number that is not finite.
        IncompatibleRun: the file was written in another format version.
    """
    data = _io.read_bytes(path, sha256=sha256)
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = json.loads(header["__metadata__"]["circuits"])
        written, config, digest = metadata["format"], metadata["config"], metadata["sha256"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptRun(f"{path} is not a whole model file of circuits: {error}") from error
    if written != FORMAT:
        raise IncompatibleRun(f"{path} is in format {written!r}: this version reads {FORMAT!r}")
    if digest != _digest(config, tensors):
        raise CorruptRun(f"{path} was altered: its weights differ from the recorded digest; make it anew")
    for key, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise CorruptRun(f"{path}: {key} holds a NaN or an infinity")
    try:
        model = Transformer(_io.from_json(ModelConfig, json.loads(config)))
        model.to(tensors["embed.W_E"].dtype).load_state_dict(tensors)
    except (BadInput, ValueError, KeyError, RuntimeError) as error:
        raise CorruptRun(f"{path}: config and weights do not fit together: {error}") from error
    return model.eval()


def _digest(config: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a config and its weights: a flipped bit in safetensors loads silently."""
    parts = [config.encode()]
    for key in sorted(tensors):
        value = tensors[key]
        parts += [
            f"{key} {value.dtype} {tuple(value.shape)}".encode(),
            value.flatten().view(torch.uint8).numpy().tobytes(),
        ]
    return _io.sha256_bytes(b"\0".join(parts))
