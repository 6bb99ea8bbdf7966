"""Batches for exact patching: pairs with one answer position each, as many at a time as a memory budget allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.discovery.ablate import ablated_logits, name_of_ablation, shared_replacement
from circuits.discovery.activations import check_model, source_differences, source_values, values_at
from circuits.discovery.blocks import Blocks, blocks_of
from circuits.discovery.memory import pairs_at_a_time
from circuits.discovery.metrics import Metric, beside, check_pairs, measure, measure_at_answers
from circuits.discovery.optimal_ablation import optimal_constants
from circuits.discovery.patching import Advance, Patching
from circuits.discovery.sites import Sites, sites_of
from circuits.errors import BadInput, UnsupportedModel
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

Ablation = str | Mapping[str, Tensor]
"""The name of an ablation, or what every source gives instead: tensors by hook name, as ``replacement`` returns them
and as an optimised constant would be stored; each fits the activation there, or has size 1 along pairs or positions."""

CACHE = 16 * 2**20
"""Bytes that the changed edges taken at a time may take on a CPU, which gains nothing beyond its cache."""
LARGE = 128 * 2**20
"""As above on a GPU."""
SHARE = 16
"""What part of a given budget the changed edges may take, by their rough size: what they really take is measured."""


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

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.sites.layers[0].W_O.dtype

    @property
    def half_precision(self) -> bool:
        """Whether thousands of small changes to one sum would add up to more than they are."""
        return self.dtype not in (torch.float32, torch.float64)

    def details(self, ablation: Ablation) -> dict[str, str | int | bool]:
        """Return what a result records of the setting."""
        facts: dict[str, str | int | bool] = {"pairs": len(self.pairs), "changed": self.pairs.changed}
        facts |= {"ablation": name_of_ablation(ablation), "denoising": self.denoising}
        return facts | ({"whole_forwards_because": self.why_whole} if self.why_whole else {})


def setting_of(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric,
    *,
    ablation: Ablation,
    denoising: bool,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    neurons: bool = False,
) -> Setting:
    """Return what is to be patched, checked.

    Raises:
        BadInput: the pairs do not line up, or denoising is asked for with another ablation than ``corrupt``.
        UnknownName: no such ablation.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    check_pairs(pairs)
    if ablation == "optimal" and not denoising:
        if neurons:
            raise BadInput("ablation = 'optimal' has constants of heads and whole MLPs: expected neurons = False")
        ablation = optimal_constants(model, pairs, memory_budget=memory_budget)
    if batch_size is not None and batch_size < 1:
        raise BadInput(f"batch_size = {batch_size}: expected at least 1")
    if denoising and ablation != "corrupt":
        raise BadInput(
            f"denoising restores clean activations in the corrupt run: expected ablation = 'corrupt', not {ablation!r}"
        )
    pairs = beside(model, pairs)
    sites = sites_of(model, neurons=neurons)
    check_model(model, sites, pairs.clean)
    replaced: Mapping[str, Tensor] | None = None
    if not isinstance(ablation, str):
        missing = [name for name in sites.source_hooks if name not in ablation]
        if missing:
            raise BadInput(f"ablation lacks {missing[0]!r}: expected a tensor for each of {sites.source_hooks}")
        replaced = {name: ablation[name].detach().to(pairs.clean.device) for name in sites.source_hooks}
    else:
        replaced = shared_replacement(model, sites, pairs, ablation, memory_budget=memory_budget, batch_size=batch_size)
    blocks, why = None, ""
    try:
        blocks = blocks_of(model, sites, pairs.clean[:2])
    except (UnsupportedModel, RuntimeError) as error:  # a bridge says by the latter that a block has no such part
        why = str(error)
    return Setting(model, sites, pairs, metric, replaced, denoising, blocks, why)


def patchings(
    setting: Setting,
    rehearse: Callable[[Patching], object],
    *,
    kept: int,
    memory_budget: int | None = None,
    batch_size: int | None = None,
) -> Iterator[tuple[Int[Tensor, " row"], Patching]]:
    """Yield the pairs' numbers and their run, batch by batch; all pairs of a batch have one answer position.

    Args:
        setting: What is patched.
        rehearse: Does with a run what takes most memory.
        kept: Bytes that the results take.
        memory_budget: Bytes that everything may take beside the model; None: 512 MB beside the results.
        batch_size: Pairs at a time, at most.

    Raises:
        BadInput: the budget does not hold a single pair.
        UnsupportedModel: the model cannot be taken apart.
    """
    size = patched_at_a_time(setting, rehearse, kept=kept, memory_budget=memory_budget, batch_size=batch_size)
    yield from patchings_of(setting, size, memory_budget)


def patched_at_a_time(
    setting: Setting,
    rehearse: Callable[[Patching], object],
    *,
    kept: int,
    memory_budget: int | None,
    batch_size: int | None,
) -> int:
    """Return how many pairs to take at a time. Arguments and errors are those of ``patchings``."""
    blocks, pairs = setting.blocks, setting.pairs
    if blocks is None:
        raise UnsupportedModel(setting.why_whole)
    # the longest run takes most
    position = int(pairs.position.max())

    def one(n: int) -> object:
        rows = torch.arange(n, device=pairs.clean.device)
        patching = _patching(setting, blocks, rows, position, memory_budget)
        return patching, rehearse(patching)

    cfg = setting.model.cfg
    per_position = 4 * len(setting.sites.graph.sources) * cfg.d_model + 4 * (getattr(cfg, "d_vocab", None) or 0)
    estimate = 4 * len(pairs) * pairs.clean.shape[1] * per_position + CACHE
    return pairs_at_a_time(
        one, len(pairs), memory_budget=memory_budget, kept=kept, batch_size=batch_size, estimate=estimate
    )


def patchings_of(
    setting: Setting, size: int, memory_budget: int | None = None
) -> Iterator[tuple[Int[Tensor, " row"], Patching]]:
    """Yield the pairs' numbers and their run in batches of the given size.

    Raises:
        UnsupportedModel: the model cannot be taken apart.
    """
    blocks = setting.blocks
    if blocks is None:
        raise UnsupportedModel(setting.why_whole)
    for position in setting.pairs.position.unique().tolist():
        rows = (setting.pairs.position == position).nonzero().flatten()
        for part in rows.split(size):
            yield part, _patching(setting, blocks, part, position, memory_budget)


def _patching(setting: Setting, blocks: Blocks, rows: Tensor, position: int, memory_budget: int | None) -> Patching:
    # no earlier position sees a later one: what lies after the answer's need not be run
    length = position + 1 if blocks.causal else setting.tokens.shape[1]
    part = setting.pairs.take(rows)
    model, sites = setting.model, setting.sites
    values = values_at(model, sites.all_hooks, setting.tokens[rows, :length])
    if setting.replaced is None:
        others = part.clean if setting.denoising else part.corrupt
        replaced: Mapping[str, Tensor] = source_values(model, sites, others[:, :length])
    else:
        replaced = {name: fitting(t, rows, length) for name, t in setting.replaced.items()}
    changes = source_differences(sites, replaced, values)
    extremes = torch.stack(torch.aminmax(changes))  # no copies of them all, as isfinite makes
    if not bool(torch.isfinite(extremes).all()):
        wrong = changes.flatten(1).isfinite().all(1).logical_not().nonzero()[0]
        name = sites.graph.sources[int(wrong)]
        raise BadInput(f"the output of source {name} is not finite: check the model's weights")

    def measured(logits: Tensor) -> Tensor:
        return torch.stack(
            [measure_at_answers(setting.metric, own, part) for own in logits.unflatten(0, (-1, len(rows)))]
        )

    chunk, of_one = (sets_at_a_time(sites, model, n, len(rows), memory_budget) for n in (length, 1))
    return Patching(blocks, values, changes.to(values[sites.embed].dtype), position, measured, chunk, of_one)


def fitting(tensor: Tensor, rows: Tensor, length: int) -> Tensor:
    """Return the part of a replacement that belongs to some pairs and to the first positions."""
    tensor = tensor if tensor.shape[0] == 1 else tensor[rows]
    return tensor if tensor.shape[1] == 1 else tensor[:, :length]


def sets_at_a_time(sites: Sites, model: HookedModel, length: int, rows: int, memory_budget: int | None) -> int:
    """Return how many changed edges of ``rows`` pairs to take at a time, of which each goes on by itself."""
    d_model = model.cfg.d_model
    d_mlp = 0 if sites.layers[0].mlp_out is None else (getattr(model.cfg, "d_mlp", None) or 4 * d_model)
    width = sum(W.shape[0] * W.shape[2] for W in sites.layers[0].W)
    # One changed edge on its way through a block: its stream, q, k, v, and the MLP before and after its function.
    moving = length * (8 * d_model + 2 * width + 2 * d_mlp) + 2 * (getattr(model.cfg, "d_vocab", None) or 0)
    room = CACHE if torch.device(model.cfg.device).type == "cpu" else LARGE
    room = room if memory_budget is None else min(room, memory_budget // SHARE)
    return max(1, room // (4 * moving * rows))


def whole_effects(
    setting: Setting,
    change: Bool[Tensor, "set edge"],
    *,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    advance: Advance,
) -> Float[Tensor, "pair set"]:
    """Return what changing each set of edges does to each pair's metric, by whole forwards with hooks.

    Raises:
        BadInput: the budget does not hold a single pair.
    """
    pairs = setting.pairs
    size = pairs_at_a_time(
        lambda n: _whole(setting, pairs.clean.new_tensor(range(n)), change, 1, memory_budget),
        len(pairs),
        memory_budget=memory_budget,
        kept=4 * len(pairs) * len(change),
        batch_size=batch_size,
    )
    out = torch.empty(len(pairs), len(change), device=pairs.clean.device)
    for rows in torch.arange(len(pairs), device=out.device).split(size):
        out[rows] = _whole(setting, rows, change, len(change), memory_budget, advance).to(out.dtype)
    return out


def whole_replaced(setting: Setting, rows: Int[Tensor, " row"]) -> Mapping[str, Tensor]:
    """Return what the sources of some pairs give to changed edges."""
    if setting.replaced is not None:
        return {name: fitting(t, rows, setting.tokens.shape[1]) for name, t in setting.replaced.items()}
    part = setting.pairs.take(rows)
    return source_values(setting.model, setting.sites, part.clean if setting.denoising else part.corrupt)


def _whole(
    setting: Setting,
    rows: Int[Tensor, " row"],
    change: Bool[Tensor, "set edge"],
    chunks: int,
    memory_budget: int | None,
    advance: Advance = lambda n: None,
) -> Float[Tensor, "pair done"]:
    """Return the effects on some pairs of the first ``chunks`` groups of sets that are taken at a time."""
    sites, part = setting.sites, setting.pairs.take(rows)
    replaced = whole_replaced(setting, rows)
    none = ablated_logits(setting.model, sites, setting.tokens[rows], replaced, torch.ones_like(change[:1]))
    base = measure(setting.metric, none[0], part)
    del none
    found = [base.new_zeros(0, len(rows))]
    n_sets = sets_at_a_time(sites, setting.model, setting.tokens.shape[1], len(rows), memory_budget)
    for sets in change.split(n_sets)[:chunks]:
        logits = ablated_logits(setting.model, sites, setting.tokens[rows], replaced, ~sets)
        found.append(torch.stack([measure(setting.metric, own, part) - base for own in logits]))
        advance(len(sets))
    return torch.cat(found).T
