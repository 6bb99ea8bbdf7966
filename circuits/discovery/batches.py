"""Batches for exact patching: pairs with one answer position each, as many at a time as a memory budget allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.discovery.ablate import ablated_logits, replacement
from circuits.discovery.activations import check_model, source_differences, source_values
from circuits.discovery.blocks import Blocks, activations_at, blocks_of
from circuits.discovery.metrics import Metric, check_pairs, measure, measure_at_answers
from circuits.discovery.patching import Advance, Patching
from circuits.discovery.sites import Sites, sites_of
from circuits.errors import BadInput, UnsupportedModel
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

Ablation = str | Mapping[str, Tensor]
"""The name of an ablation, or what every source gives instead: tensors by hook name, as ``replacement`` returns them
and as an optimised constant would be stored; each fits the activation there, or has size 1 along pairs or positions."""

BUDGET = 512 * 2**20
"""Bytes that a batch's activations may take where no budget is given."""
CACHE = 16 * 2**20
"""Bytes that the changed edges taken at a time may take on a CPU."""
MOST = 2**30
"""As above where a budget is given, however large."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What is patched: a model, its pairs, the metric, and what changed sources give."""

    model: HookedModel
    sites: Sites
    pairs: Pairs
    metric: Metric
    replaced: Mapping[str, Tensor] | None
    """None: each pair's own other run."""
    denoising: bool
    blocks: Blocks | None
    """None where the model cannot be taken apart; then it runs whole, with hooks."""
    why_whole: str = ""

    @property
    def tokens(self) -> Int[Tensor, "pair pos"]:
        """What the run to be changed reads."""
        return self.pairs.corrupt if self.denoising else self.pairs.clean

    def details(self, ablation: Ablation) -> dict[str, str | int | bool]:
        """Return what a result records of the setting."""
        name = ablation if isinstance(ablation, str) else "given"
        facts: dict[str, str | int | bool] = {"pairs": len(self.pairs), "changed": self.pairs.changed}
        facts |= {"ablation": name, "denoising": self.denoising}
        return facts | ({"whole_forwards_because": self.why_whole} if self.why_whole else {})


def setting_of(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric,
    *,
    ablation: Ablation,
    denoising: bool,
    batch_size: int | None,
    neurons: bool = False,
) -> Setting:
    """Return what is to be patched, checked.

    Raises:
        BadInput: the pairs do not line up, or denoising is asked for with another ablation than ``corrupt``.
        UnknownName: no such ablation.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    check_pairs(pairs)
    if batch_size is not None and batch_size < 1:
        raise BadInput(f"batch_size = {batch_size}: expected at least 1")
    if denoising and ablation != "corrupt":
        raise BadInput(
            f"denoising restores clean activations in the corrupt run: expected ablation = 'corrupt', not {ablation!r}"
        )
    pairs = pairs.to(model.cfg.device)
    sites = sites_of(model, neurons=neurons)
    check_model(model, sites, pairs.clean)
    replaced: Mapping[str, Tensor] | None = None
    if not isinstance(ablation, str):
        missing = [name for name in sites.source_hooks if name not in ablation]
        if missing:
            raise BadInput(f"ablation lacks {missing[0]!r}: expected a tensor for each of {sites.source_hooks}")
        replaced = {name: ablation[name].detach().to(pairs.clean.device) for name in sites.source_hooks}
    elif ablation != "corrupt":
        replaced = replacement(model, sites, pairs, ablation, batch_size=batch_size or 256)
    blocks, why = None, ""
    try:
        blocks = blocks_of(model, sites, pairs.clean[:2])
    except (UnsupportedModel, RuntimeError) as error:  # a bridge says by the latter that a block has no such part
        why = str(error)
    return Setting(model, sites, pairs, metric, replaced, denoising, blocks, why)


def patchings(
    setting: Setting, *, memory_budget: int | None = None, batch_size: int | None = None
) -> Iterator[tuple[Int[Tensor, " row"], Patching]]:
    """Yield the pairs' numbers and their run, batch by batch; all pairs of a batch have one answer position.

    Raises:
        BadInput: the budget does not hold a single pair.
        UnsupportedModel: the model cannot be taken apart.
    """
    blocks = setting.blocks
    if blocks is None:
        raise UnsupportedModel(setting.why_whole)
    for position in setting.pairs.position.unique().tolist():
        # no earlier position sees a later one: what lies after the answer's need not be run
        length = position + 1 if blocks.causal else setting.tokens.shape[1]
        rows = (setting.pairs.position == position).nonzero().flatten()
        size, chunk = sizes(setting.sites, setting.model, length, len(rows), memory_budget, batch_size)
        for part in rows.split(size):
            yield part, _patching(setting, blocks, part, position, length, chunk)


def _patching(setting: Setting, blocks: Blocks, rows: Tensor, position: int, length: int, chunk: int) -> Patching:
    part = setting.pairs.take(rows)
    model, sites = setting.model, setting.sites
    values, _ = activations_at(model, sites.all_hooks, setting.tokens[rows, :length])
    if setting.replaced is None:
        others = part.clean if setting.denoising else part.corrupt
        replaced: Mapping[str, Tensor] = source_values(model, sites, others[:, :length])
    else:
        replaced = {name: fitting(t, rows, length) for name, t in setting.replaced.items()}
    changes = source_differences(sites, replaced, values)
    for name, change in zip(sites.graph.sources, changes, strict=True):
        if not bool(torch.isfinite(change).all()):
            raise BadInput(f"the output of source {name} is not finite: check the model's weights")

    def measured(logits: Tensor) -> Tensor:
        return torch.stack(
            [measure_at_answers(setting.metric, own, part) for own in logits.unflatten(0, (-1, len(rows)))]
        )

    return Patching(blocks, values, changes.to(values[sites.embed].dtype), position, measured, chunk)


def fitting(tensor: Tensor, rows: Tensor, length: int) -> Tensor:
    """Return the part of a replacement that belongs to some pairs and to the first positions."""
    tensor = tensor if tensor.shape[0] == 1 else tensor[rows]
    return tensor if tensor.shape[1] == 1 else tensor[:, :length]


def sizes(
    sites: Sites, model: HookedModel, length: int, n: int, memory_budget: int | None, batch_size: int | None
) -> tuple[int, int]:
    """Return how many pairs, and how many changed edges of them, to take at a time.

    Raises:
        BadInput: the budget does not hold a single pair.
    """
    d_model, n_sources = model.cfg.d_model, len(sites.graph.sources)
    d_mlp = 0 if sites.layers[0].mlp_out is None else (getattr(model.cfg, "d_mlp", None) or 4 * d_model)
    width = sum(W.shape[0] * W.shape[2] for W in sites.layers[0].W)
    heads = sites.layers[0].W_O.shape[0] * sites.layers[0].W_O.shape[1]
    # A run's activations, the other run's, and the difference of every source, kept for the whole batch.
    kept = len(sites.layers) * (3 * d_model + 2 * width + 2 * heads + d_model) + (n_sources + 6) * d_model
    # One changed edge on its way through a block: its stream, q, k, v, and the MLP before and after its function.
    moving = 8 * d_model + 2 * width + 2 * d_mlp
    item = 4 * length
    kept, moving = kept * item, moving * item
    if memory_budget is None:
        size = min(n, batch_size or max(1, BUDGET // kept))
        on_cpu = torch.device(model.cfg.device).type == "cpu"
        # Beyond a core's cache a CPU gains nothing from more rows.
        return size, max(1, (CACHE if on_cpu else BUDGET) // (moving * size))
    if memory_budget < kept + moving:
        raise BadInput(f"memory_budget = {memory_budget} bytes: one pair takes {kept + moving}")
    size = min(n, batch_size or n, memory_budget // (kept + moving))
    return size, max(1, min((memory_budget - size * kept) // (size * moving), MOST // (size * moving)))


def whole_effects(
    setting: Setting, change: Bool[Tensor, "set edge"], *, batch_size: int | None = None, advance: Advance
) -> Float[Tensor, "pair set"]:
    """Return what changing each set of edges does to each pair's metric, by whole forwards with hooks."""
    sites, pairs = setting.sites, setting.pairs
    size, chunk = sizes(sites, setting.model, pairs.clean.shape[1], len(pairs), None, batch_size)
    out = torch.empty(len(pairs), len(change), device=pairs.clean.device)
    for rows in torch.arange(len(pairs), device=out.device).split(size):
        part = pairs.take(rows)
        replaced = setting.replaced
        if replaced is None:
            replaced = source_values(setting.model, sites, part.clean if setting.denoising else part.corrupt)
        else:
            replaced = {name: fitting(t, rows, pairs.clean.shape[1]) for name, t in replaced.items()}
        none = ablated_logits(setting.model, sites, setting.tokens[rows], replaced, torch.ones_like(change[:1]))
        base = measure(setting.metric, none[0], part)
        at = 0
        for sets in change.split(chunk):
            logits = ablated_logits(setting.model, sites, setting.tokens[rows], replaced, ~sets)
            for own in logits:
                out[rows, at] = measure(setting.metric, own, part) - base
                at += 1
            advance(len(sets))
    return out
