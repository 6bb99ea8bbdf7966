"""Which edges a model's weights can carry, and which of them some pairs set in motion."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.model import Transformer
from circuits.tasks.base import Pairs

Edge = tuple[str, str]
Directions = Bool[Tensor, " d_model"]


def weight_edges(model: Transformer) -> frozenset[Edge]:
    """Return the edges whose source writes a residual coordinate that the reader reads, on a path to the logits.

    Meant for models whose residual coordinates mean something each, without normalization: compiled programs.

    Source: the definition of a Tracr model's residual stream in Lindner et al. 2023, arXiv 2301.05062, section 3.
    """
    writes, reads = _written(model), _read(model)
    edges = {
        (source, reader)
        for reader, wanted in reads.items()
        for source, given in writes.items()
        if _before(source, reader) and bool((given & wanted).any())
    }
    return on_a_path(edges)


def active_edges(model: Transformer, pairs: Pairs, edges: frozenset[Edge]) -> frozenset[Edge]:
    """Return which edges carry something else on the corrupt inputs in a coordinate that their reader reads."""
    changes, reads = source_changes(model, pairs), _read(model)
    moved = {
        (source, reader)
        for source, reader in edges
        if float((changes[source].abs().amax((0, 1)) * reads[reader]).max()) > 1e-4
    }
    return on_a_path(moved)


def on_a_path(edges: set[Edge] | frozenset[Edge]) -> frozenset[Edge]:
    """Return the edges that lie on a path from an embedding to the logits."""
    left = set(edges)
    while True:
        written = {component(reader) for _, reader in left} | {"embed", "pos_embed"}
        used = {source for source, _ in left} | {"logits"}
        kept = {(s, r) for s, r in left if s in written and component(r) in used}
        if kept == left:
            return frozenset(left)
        left = kept


def component(reader: str) -> str:
    """Return the component that a reader belongs to: ``a0.h1`` of ``a0.h1.q``."""
    return reader[:-2] if reader[-2:] in (".q", ".k", ".v") else reader


def source_changes(model: Transformer, pairs: Pairs) -> dict[str, Float[Tensor, "pair pos d_model"]]:
    """Return what every source writes on the corrupt inputs minus what it writes on the clean ones."""
    clean, corrupt = (_outputs(model, tokens) for tokens in (pairs.clean, pairs.corrupt))
    return {name: corrupt[name] - clean[name] for name in clean}


def _outputs(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        _, cache = model.run_with_cache(
            tokens, names_filter=lambda name: name.endswith(("embed", "hook_z", "hook_mlp_out"))
        )
        out: dict[str, Tensor] = {"embed": cache["hook_embed"]}
        if model.config.positional:
            out["pos_embed"] = cache["hook_pos_embed"].expand_as(out["embed"])
        for i, block in enumerate(_blocks(model)):
            heads = torch.einsum("bphe,hed->hbpd", cache[f"blocks.{i}.attn.hook_z"], block.attn.W_O)
            out |= {f"a{i}.h{h}": head for h, head in enumerate(heads)}
            if not model.config.attn_only:
                out[f"m{i}"] = cache[f"blocks.{i}.hook_mlp_out"]
    return out


def _written(model: Transformer) -> dict[str, Directions]:
    out = {"embed": model.embed.W_E.any(0)}
    if model.config.positional:
        out["pos_embed"] = model.pos_embed.W_pos.any(0)
    for i, block in enumerate(_blocks(model)):
        out |= {f"a{i}.h{h}": W.any(0) for h, W in enumerate(block.attn.W_O)}
        if not model.config.attn_only:
            out[f"m{i}"] = block.mlp.W_out.any(0) | (block.mlp.b_out != 0)
    return out


def _read(model: Transformer) -> dict[str, Directions]:
    out: dict[str, Directions] = {}
    for i, block in enumerate(_blocks(model)):
        for kind in "QKV":
            weights = getattr(block.attn, f"W_{kind}")
            out |= {f"a{i}.h{h}.{kind.lower()}": W.any(1) for h, W in enumerate(weights)}
        if not model.config.attn_only:
            out[f"m{i}"] = block.mlp.W_in.any(1)
    return out | {"logits": model.unembed.W_U.any(1)}


def _before(source: str, reader: str) -> bool:
    return _time(source, writes=True) < _time(reader, writes=False)


def _time(name: str, *, writes: bool) -> float:
    """When in a forward pass a source has written or a reader reads."""
    if name in ("embed", "pos_embed"):
        return -1
    if name == "logits":
        return torch.inf
    layer = int(name[1:].split(".")[0])
    return 4 * layer + (2 if name.startswith("m") else 0) + writes


def _blocks(model: Transformer) -> list[Any]:
    return list(model.blocks)
