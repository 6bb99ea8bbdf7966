"""The model with any set of edges ablated, in one forward pass, for several sets at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from circuits.discovery.activations import Store, head_outputs, neuron_outputs, source_values
from circuits.discovery.memory import pairs_at_a_time
from circuits.discovery.sites import Layer, Neurons, Norm, Sites
from circuits.errors import BadInput, UnknownName
from circuits.model import Hook, HookedModel
from circuits.tasks.base import Pairs

ABLATIONS = ("corrupt", "mean", "zero")
SAME_POSITIONS = ("corrupt", "mean")
"""Ablations under which a position embedding gives what it gives anyway, so that its edges carry nothing: all inputs
have the same positions."""


def replacement(
    model: HookedModel,
    sites: Sites,
    pairs: Pairs,
    ablation: str | Mapping[str, Tensor],
    *,
    batch_size: int | None = None,
) -> Store:
    """Return what the sources give to an ablated edge, by hook name.

    Args:
        model: The model.
        sites: Its sources and readers.
        pairs: Clean and corrupt inputs.
        ablation: ``corrupt``: each pair's own activation on its corrupt input; ``mean``: at each position, the mean
            activation over the clean inputs; ``zero``: nothing; or constants as from ``optimal_constants``.
        batch_size: Inputs at a time, of the mean; None for all.

    Raises:
        UnknownName: no such ablation.
        BadInput: constants are given, but not for every source.
    """
    if not isinstance(ablation, str):
        if missing := [name for name in sites.source_hooks if name not in ablation]:
            raise BadInput(f"the constants lack {missing[0]}: expected one for each of {', '.join(sites.source_hooks)}")
        return dict(ablation)
    if ablation not in ABLATIONS:
        raise UnknownName("ablation", ablation, ABLATIONS)
    if ablation == "corrupt":
        return source_values(model, sites, pairs.corrupt)
    if ablation == "zero":
        return {name: torch.zeros_like(value) for name, value in source_values(model, sites, pairs.clean[:1]).items()}
    totals: Store = {}
    for tokens in pairs.clean.split(batch_size or len(pairs)):
        for name, value in source_values(model, sites, tokens).items():
            part = value.sum(0, keepdim=True)
            totals[name] = totals[name] + part if name in totals else part
    return {name: total / len(pairs) for name, total in totals.items()}


def shared_replacement(
    model: HookedModel,
    sites: Sites,
    pairs: Pairs,
    ablation: str | Mapping[str, Tensor],
    *,
    memory_budget: int | None = None,
    batch_size: int | None = None,
) -> Store | None:
    """Return the replacements that all pairs have in common, found within a budget; None where each has its own.

    Raises:
        UnknownName: no such ablation.
        BadInput: constants are given, but not for every source; or the budget does not hold one pair.
    """
    if isinstance(ablation, str) and ablation == "corrupt":
        return None
    size = None
    if isinstance(ablation, str) and ablation == "mean":
        size = pairs_at_a_time(
            lambda n: source_values(model, sites, pairs.clean[:n]),
            min(len(pairs), 256),
            memory_budget=memory_budget,
            batch_size=batch_size,
        )
    return replacement(model, sites, pairs, ablation, batch_size=size)


def name_of_ablation(ablation: str | Mapping[str, Tensor]) -> str:
    """Return the name under which an ablation is reported."""
    return ablation if isinstance(ablation, str) else "constants"


def ablated_logits(
    model: HookedModel,
    sites: Sites,
    tokens: Int[Tensor, "batch pos"],
    replaced: Mapping[str, Tensor],
    keep: Shaped[Tensor, "set *pos edge"],
) -> Float[Tensor, "set batch pos d_vocab_out"]:
    """Return the logits with each edge scaled between its replacement (0) and what its source gives in this run (1).

    The model runs itself, once for all sets; hooks correct what each reader sees. Reader v of set k gets the stream
    plus the sum over sources u of (1 - keep[k, u -> v]) (replaced_u - a_u), where a_u is u's output in this very
    run, so that what one ablation does to later sources is taken in. Differentiable with respect to ``keep``.

    Args:
        model: The model.
        sites: Its sources and readers.
        tokens: What it reads.
        replaced: As from ``replacement``.
        keep: One number per set and edge, or per set, token position and edge.

    Source: Miller, Chughtai and Saunders 2024, arXiv 2407.08734, and Conmy et al. 2023, arXiv 2304.14997
        (edges as additive terms of a reader's input); the batch over sets of edges is our own.

    Raises:
        BadInput: ``keep`` does not have one column per edge.
    """
    shapes = [(sites.graph.n_edges,), (tokens.shape[1], sites.graph.n_edges)]
    if keep.shape[1:] not in shapes:
        raise BadInput(
            f"keep has shape {tuple(keep.shape)}: expected [set, {sites.graph.n_edges}], a column per edge, or "
            f"[set, {tokens.shape[1]}, {sites.graph.n_edges}], position by position"
        )
    correction = _Correction(sites, replaced, keep.to(replaced[sites.embed]))
    with model.hooks(fwd_hooks=correction.hooks()):
        logits = model(tokens.repeat(len(keep), 1))
    return logits.unflatten(0, (len(keep), -1))


def ablated_logits_by_pair(
    model: HookedModel,
    sites: Sites,
    tokens: Int[Tensor, "pair pos"],
    replaced: Mapping[str, Tensor],
    keep: Float[Tensor, "pair edge"],
) -> Float[Tensor, "pair pos d_vocab_out"]:
    """Return the logits of each input under its own scale of every edge, as ``ablated_logits`` does for sets.

    Differentiable with respect to ``keep``: one backward gives the gradient of every pair and edge.
    """
    own = {name: tensor.expand(len(tokens), *tensor.shape[1:])[:, None] for name, tensor in replaced.items()}
    correction = _Correction(sites, own, keep.to(replaced[sites.embed]))
    with model.hooks(fwd_hooks=correction.hooks()):
        return model(tokens)


class _Correction:
    """The hooks of one ablated forward, with what its sources have written so far."""

    def __init__(self, sites: Sites, replaced: Mapping[str, Tensor], keep: Float[Tensor, "set *pos edge"]) -> None:
        self.sites, self.replaced, self.n_sets = sites, replaced, len(keep)
        self.removed = sites.graph.dense(1 - keep)
        # Where the mask's gradient is wanted, an edge that is kept whole counts too.
        edge = sites.graph.dense(torch.ones_like(keep)) if keep.requires_grad else self.removed
        self.affected: list[list[bool]] = (edge != 0).flatten(0, -3).any(0).tolist()
        # By the first of a group of neighbouring sources: what they would write if replaced, minus what they write.
        self.lacking: dict[int, Float[Tensor, "set source row d_model"]] = {}
        self.stream = torch.empty(0)

    def hooks(self) -> list[Hook]:
        """Return one hook for each place where sources write or readers read."""
        hooks: list[Hook] = [(self.sites.embed, self._wrote(0, self.sites.embed))]
        source, reader = 1, 0
        if self.sites.pos_embed is not None:
            hooks.append((self.sites.pos_embed, self._wrote(1, self.sites.pos_embed)))
            source = 2
        for layer in self.sites.layers:
            hooks.append((layer.resid, self._remember))
            for j, name in enumerate(layer.qkv):
                hooks.append((name, self._projects(layer, j, reader)))
                reader += layer.W[j].shape[0]
            hooks.append((layer.z, self._wrote(source, layer.z, layer)))
            source += layer.W_O.shape[0]
            if layer.mlp_in is not None and layer.mlp_out is not None:
                name = layer.mlp_out if layer.neurons is None else layer.neurons.post
                reads = self._reads(reader, layer.norm if layer.shares_norm else None)
                hooks += [(layer.mlp_in, reads), (name, self._wrote(source, name, layer.neurons))]
                source, reader = source + layer.n_mlp_sources, reader + 1
        return [*hooks, (self.sites.final, self._reads(reader))]

    def _wrote(self, source: int, name: str, parts: Layer | Neurons | None = None) -> Callable[..., None]:
        """Take note of what a source, or all heads or neurons of a layer from it on, would write if replaced."""

        def hook(tensor: Tensor, *, hook: Any) -> None:
            lacking = self.replaced[name] - tensor.unflatten(0, (self.n_sets, -1))
            if parts is None:
                self.lacking[source] = lacking.flatten(1, 2)[:, None]
                return
            written = head_outputs if isinstance(parts, Layer) else neuron_outputs
            self.lacking[source] = written(parts, lacking).flatten(2, 3).transpose(0, 1)  # type: ignore[arg-type]

        return hook

    def _remember(self, tensor: Tensor, *, hook: Any) -> None:
        self.stream = tensor

    def _change(self, first: int, last: int) -> Float[Tensor, "set reader row d_model"] | None:
        """The sum over removed edges of what readers ``first`` to ``last`` are to see instead; None for no change."""
        total: Tensor | None = None
        for source, lacking in self.lacking.items():
            until = source + lacking.shape[1]
            if not any(any(row[source:until]) for row in self.affected[first:last]):
                continue
            weights = self.removed[..., first:last, source:until]
            if weights.ndim == 3:
                part = torch.bmm(weights, lacking.flatten(2))
            else:
                places = lacking.unflatten(2, (-1, weights.shape[1]))
                part = torch.einsum("kprs,ksbpd->krbpd", weights, places).flatten(2)
            total = part if total is None else total + part
        return None if total is None else total.unflatten(2, (-1, self.stream.shape[-1]))

    def _projects(self, layer: Layer, which: int, first: int) -> Callable[..., Tensor | None]:
        """Replace the q, k or v of a layer by that of the changed inputs."""

        def hook(tensor: Tensor, *, hook: Any) -> Tensor | None:
            change = self._change(first, first + layer.W[which].shape[0])
            if change is None:
                return None
            stream = self.stream.reshape(self.n_sets, 1, -1, self.stream.shape[-1])
            projected = layer.project(which, stream + change)
            return projected.transpose(1, 2).reshape(tensor.shape)

        return hook

    def _reads(self, reader: int, norm: Norm | None = None) -> Callable[..., Tensor | None]:
        """Change the input of an MLP or of the logits; with a norm, where the hook lies behind that."""

        def hook(tensor: Tensor, *, hook: Any) -> Tensor | None:
            change = self._change(reader, reader + 1)
            if change is None:
                return None
            if norm is None:
                return tensor + change.reshape(tensor.shape)
            return norm(self.stream + change.reshape(self.stream.shape)).to(tensor.dtype)

        return hook
