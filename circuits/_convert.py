"""Weights in TransformerLens's names: read from any release's orientation, and handed to a ``TransformerBridge``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.errors import BadInput, CorruptRun, UnsupportedModel

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

KNOWN_KEY = re.compile(
    r"embed\.W_E|pos_embed\.W_pos|unembed\.(W|b)_U|ln_final\.[wb]"
    r"|blocks\.\d+\.(ln[12]\.[wb]|attn\.[Wb]_[QKVO]|mlp\.(W_in|W_gate|W_out|b_in|b_out))"
)
BUFFERS = (".mask", ".IGNORE")


def read_state_dict(
    state_dict: Mapping[str, Any], *, normalization: str | None, n_heads: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the sizes that a TransformerLens state dict implies, and its weights in today's orientation.

    Older releases store each matrix transposed: ``W_E [d_model, d_vocab]``, ``W_Q [n_heads, d_head, d_model]``,
    ``W_O [d_model, n_heads * d_head]`` or ``[n_heads, d_model, d_head]``, ``W_in [d_mlp, d_model]``, and the first ones
    ``W_U [d_vocab, d_model]`` and ``W_pos [d_model, n_ctx]`` too. A matrix whose
    shape fits both is read as the others of the dict are; where none decides, as in today's TransformerLens.

    Raises:
        BadInput: a key is unknown, a weight is missing, or shapes contradict each other.
        CorruptRun: a weight is not finite.
    """
    state = dict(_weights(state_dict))
    _check_keys(state, normalization)
    state = _ends_turned(state)
    if "pos_embed.W_pos" in state:
        n_ctx, d_model = _shape(state, "pos_embed.W_pos", 2)
    else:
        masks = [v for k, v in state_dict.items() if k.endswith(".mask")]
        if not masks:
            raise BadInput("pos_embed.W_pos is missing, and without an attention mask the context length is unknown")
        n_ctx, d_model = masks[0].shape[-1], _shape(state, "unembed.W_U", 2)[0]
    heads, d_head = _head_sizes(state, d_model)
    if n_heads not in (None, heads):
        raise BadInput(f"n_heads {n_heads}: blocks.0.attn.W_Q has {heads} heads")
    d_mlp = None
    if "blocks.0.mlp.W_in" in state:
        d_mlp = _other(state, "blocks.0.mlp.W_in", d_model)
    sizes: dict[str, Any] = {
        "d_vocab": _other(state, "embed.W_E", d_model),
        "d_vocab_out": _other(state, "unembed.W_U", d_model),
        "n_ctx": n_ctx,
        "n_layers": _n_layers(state),
        "d_model": d_model,
        "n_heads": heads,
        "d_head": d_head,
        "d_mlp": d_mlp,
        "gated": "blocks.0.mlp.W_gate" in state,
        "attn_only": d_mlp is None,
        "attn_bias": any(".attn.b_" in key for key in state),
        "mlp_bias": any(".mlp.b_" in key for key in state),
        "unembed_bias": "unembed.b_U" in state,
        "positional": "pos_embed.W_pos" in state,
    }
    return sizes, _oriented(state, sizes)


def complete(state: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with zeros for absent biases, its keys and shapes equal to those of ``parameters``.

    Raises:
        BadInput: another weight is missing, one is too many, or one has another shape.
    """
    out = dict(state)
    for key, parameter in parameters.items():
        if key not in out and ".b_" in key:
            out[key] = torch.zeros_like(parameter, dtype=state["embed.W_E"].dtype)
    missing, unknown = sorted(set(parameters) - set(out)), sorted(set(out) - set(parameters))
    if missing or unknown:
        told = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"not expected: {', '.join(unknown)}"] * bool(
            unknown
        )
        raise BadInput(f"the state dict does not fit the model that it implies: {'; '.join(told)}")
    for key, parameter in parameters.items():
        if out[key].shape != parameter.shape:
            raise BadInput(f"{key} has shape {tuple(out[key].shape)}: expected {tuple(parameter.shape)}")
    return out


def _weights(state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state_dict.items():
        if key.endswith(BUFFERS):
            continue
        if not KNOWN_KEY.fullmatch(key):
            unknown = [k for k in state_dict if not k.endswith(BUFFERS) and not KNOWN_KEY.fullmatch(k)]
            raise BadInput(
                f"no TransformerLens weight is named {', '.join(unknown[:8])}: expected names such as "
                "blocks.0.attn.W_Q (a checkpoint may hold the weights under a key of its own, such as 'model')"
            )
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise BadInput(f"{key} is no tensor of floating-point numbers")
        if not bool(value.isfinite().all()):
            raise CorruptRun(f"{key} holds a NaN or an infinity")
        yield key, value.detach()


def _check_keys(state: Mapping[str, Tensor], normalization: str | None) -> None:
    for key in ("embed.W_E", "unembed.W_U", *(f"blocks.0.attn.W_{m}" for m in "QKVO")):
        if key not in state:
            raise BadInput(f"{key} is missing from the state dict")
    norms = sorted(key for key in state if key.endswith((".w", ".b")))
    if norms and normalization is None:
        raise BadInput(f"the state dict has norms ({norms[0]}): pass normalization='LN' or 'RMS'")


def _ends_turned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with W_pos and W_U as today, where one size alone can be that of the residual stream."""
    ends = [key for key in ("embed.W_E", "unembed.W_U", "pos_embed.W_pos") if key in state]
    common = set.intersection(*(set(_shape(state, key, 2)) for key in ends))
    common &= set(_shape(state, "blocks.0.attn.W_Q", 3)[1:])
    if len(common) != 1:
        return state
    (d_model,) = common
    for key, axis in (("unembed.W_U", 0), ("pos_embed.W_pos", 1)):
        if key in state and state[key].shape[axis] != d_model:
            state = state | {key: state[key].T}
    return state


def _n_layers(state: Mapping[str, Tensor]) -> int:
    layers = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
    gaps = sorted(set(range(max(layers) + 1)) - layers)
    if gaps:
        raise BadInput(f"blocks.{gaps[0]} is missing from the state dict, which has blocks.{max(layers)}")
    return len(layers)


def _shape(state: Mapping[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    if state[key].ndim != ndim:
        raise BadInput(f"{key} has shape {tuple(state[key].shape)}: expected {ndim} dimensions")
    return tuple(state[key].shape)


def _other(state: Mapping[str, Tensor], key: str, d_model: int) -> int:
    """Return the size of a matrix's axis that is not the residual stream."""
    first, second = _shape(state, key, 2)
    if d_model not in (first, second):
        raise BadInput(f"{key} has shape {(first, second)}: expected one axis of d_model = {d_model}")
    return second if first == d_model else first


def _head_sizes(state: Mapping[str, Tensor], d_model: int) -> tuple[int, int]:
    heads, first, second = _shape(state, "blocks.0.attn.W_Q", 3)
    if d_model not in (first, second):
        raise BadInput(f"blocks.0.attn.W_Q has shape {(heads, first, second)}: expected an axis of d_model = {d_model}")
    return heads, second if first == d_model else first


def _oriented(state: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights as today's TransformerLens stores them."""
    expected = _expected_shapes(state, sizes)
    today: list[str] = []
    older: list[str] = []
    for key, shape in expected.items():
        got, turned = tuple(state[key].shape), (*shape[:-2], shape[-1], shape[-2])
        flat = (shape[-1], shape[0] * shape[1]) if key.endswith("W_O") else turned
        if got not in (shape, turned, flat):
            raise BadInput(f"{key} has shape {got}: expected {shape}, or {turned} as in older releases")
        if shape == turned and got == shape:
            continue
        (today if got == shape else older).append(key)
    if today and older:
        raise BadInput(f"{today[0]} is stored as in today's TransformerLens but {older[0]} as in older releases")
    if not older:
        return dict(state)
    out = dict(state)
    for key, shape in expected.items():
        if out[key].ndim < len(shape):
            out[key] = out[key].unflatten(1, shape[:2]).permute(1, 2, 0)
        else:
            out[key] = out[key].mT
    return out


def _expected_shapes(state: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return today's shape of each weight whose orientation changed between releases."""
    heads, d_model, d_head = sizes["n_heads"], sizes["d_model"], sizes["d_head"]
    by_name: dict[str, tuple[int, ...]] = {
        "W_E": (sizes["d_vocab"], d_model),
        "W_O": (heads, d_head, d_model),
        **{f"W_{m}": (heads, d_model, d_head) for m in "QKV"},
    }
    if sizes["d_mlp"] is not None:
        into, out = (d_model, sizes["d_mlp"]), (sizes["d_mlp"], d_model)
        by_name |= {"W_in": into, "W_gate": into, "W_out": out}
    shapes = {key: by_name.get(key.rpartition(".")[2]) for key in state}
    return {key: shape for key, shape in shapes.items() if shape is not None}


def to_bridge(cfg: Any, state: Mapping[str, Tensor], *, softmax_share: float) -> TransformerBridge:
    """Return a native bridge that holds ``state``.

    Args:
        cfg: TransformerLens's field names.
        state: all weights, in today's orientation; a tied unembedding written out.
        softmax_share: what the model has; a bridge only has 1.

    Raises:
        UnsupportedModel: the model has a part that a native bridge lacks.
    """
    lacking = []
    if softmax_share < 1:
        lacking.append(f"softmax_share {softmax_share:g}")
    if cfg.gated_mlp and any(bool(v.any()) for k, v in state.items() if ".mlp.b_" in k):
        lacking.append("biases in a gated MLP")
    if lacking:
        raise UnsupportedModel(f"a native TransformerBridge cannot represent {' and '.join(lacking)}")
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources import native

    try:
        from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint
    except ModuleNotFoundError as error:
        raise UnsupportedModel(
            "a native TransformerBridge takes weights by name since TransformerLens 4, and this is an older one: "
            "install transformer-lens>=4, or analyse the model itself"
        ) from error

    sizes = ("d_model", "d_head", "n_layers", "n_ctx", "n_heads", "d_vocab", "d_vocab_out", "d_mlp", "eps", "dtype")
    kinds = ("act_fn", "normalization_type", "attn_only", "attention_dir", "gated_mlp")
    config = TransformerBridgeConfig(**{name: getattr(cfg, name) for name in sizes + kinds}, init_weights=False)
    # The bridge's layers draw weights that are thrown away: not from the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        bridge = native.boot(config, device=cfg.device, dtype=cfg.dtype)
    full = _for_bridge(cfg, state)
    bridge.load_state_dict(convert_tl_checkpoint(full, config), strict=True)
    return bridge


def _for_bridge(cfg: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that a native bridge has: every bias but those of a gated MLP."""
    full = {key: value.detach() for key, value in state.items()}
    like = full["embed.W_E"]
    full.setdefault("unembed.b_U", like.new_zeros(cfg.d_vocab_out))
    full.setdefault("pos_embed.W_pos", like.new_zeros(cfg.n_ctx, cfg.d_model))
    for layer in range(cfg.n_layers):
        for name in "QKV":
            full.setdefault(f"blocks.{layer}.attn.b_{name}", like.new_zeros(cfg.n_heads, cfg.d_head))
        full.setdefault(f"blocks.{layer}.attn.b_O", like.new_zeros(cfg.d_model))
        if cfg.gated_mlp:
            full.pop(f"blocks.{layer}.mlp.b_in", None)
            full.pop(f"blocks.{layer}.mlp.b_out", None)
        elif not cfg.attn_only:
            full.setdefault(f"blocks.{layer}.mlp.b_in", like.new_zeros(cfg.d_mlp))
            full.setdefault(f"blocks.{layer}.mlp.b_out", like.new_zeros(cfg.d_model))
    return full
