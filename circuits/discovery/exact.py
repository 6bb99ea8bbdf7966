"""Exact patching of every edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.batches import Ablation, Setting, patchings, setting_of, whole_effects
from circuits.discovery.circuit import Circuit
from circuits.discovery.metrics import Metric, is_distance, logit_difference, measure, name_of
from circuits.discovery.patching import Patching
from circuits.errors import BadInput, UnsupportedModel
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

TRIED = 64
"""Pairs on which a metric that nothing has changed is tried."""


def exact(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric = logit_difference,
    *,
    ablation: Ablation = "corrupt",
    denoising: bool = False,
    by_position: bool = False,
    neurons: bool = False,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Return every edge's exact effect on the metric: the edge alone is ablated, and the rest of the model computed.

    The score of the edge u -> v is m(the model in which v alone reads u's replacement instead of u's output) - m(the
    model as it is), the mean over pairs. Nothing is approximated, and no gradient is taken, so that the metric need
    not have one (accuracy, or a divergence from the clean output, will do).

    Args:
        model: Ours or a ``TransformerBridge``, in eval mode; it is left as it is.
        pairs: Clean and corrupt inputs.
        metric: One number per pair from the logits at its position; ``logit_difference`` unless given.
        ablation: What the ablated edge carries: ``corrupt``: its source's output on the corrupt input; ``mean``: its
            mean over the clean inputs, position by position; ``zero``: nothing; ``optimal``: the constant that hurts
            least, found first by ``optimal_constants``; or constants of your own, by hook name.
        denoising: Restore the edge in the corrupt run instead: the score is then m(corrupt run) - m(corrupt run with
            that edge from the clean run), negative where restoring helps. Such scores are near zero in deep models,
            where an answer needs a whole path of clean edges and one alone restores nothing; what a single edge is
            needed for shows in noising. Restoring means something for edges into the logits and for whole sources.
        by_position: Whether to patch every edge at each token position alone too, into ``Circuit.by_position``; it
            costs as much again for each position. These effects do not add up to the edge's.
        neurons: Whether every neuron of an MLP is a source, and not the MLP as a whole.
        memory_budget: Bytes that the computation may take beside the model, its result included, from which the
            batches follow by what a few pairs are measured to take; None: 512 MB beside the result.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Cost: two forwards, which are kept, and for each edge what lies behind its reader: of attention the one changed
        head, of the last block the answer's position, of edges into the logits the unembedding alone. That is between a
        tenth and a fifth of a forward per edge on small models, where it takes a whole forward or more per edge
        otherwise. A model that cannot be taken apart into blocks takes a whole forward per edge
        (``details["whole_forwards_because"]`` says why). No backward.

    Conventions: the edge is ablated in the clean run (noising) unless ``denoising`` is asked for; there is no path to
        integrate. The score is the effect of corrupting the edge: below zero it supports the answer under
        ``logit_difference`` (MIB's files have the opposite sign).

    Source: Conmy et al. 2023, arXiv 2304.14997 (ablation of single edges); Goldowsky-Dill et al. 2023, arXiv 2304.05969
        (path patching). That all readers of a layer share one source's norm and projections is our own.

    Fails when: two edges stand in for each other, so that ablating either alone changes little (redundant heads); and
    components that differ in nothing between clean and corrupt score zero whatever they do.

    Raises:
        BadInput: the pairs do not line up, the budget does not hold one pair, a source is not finite, or the metric
            does not depend on the logits.
        UnknownName: no such ablation.
        UnsupportedModel: the model has a part that edges cannot represent.
    """
    with torch.no_grad():
        setting = setting_of(
            model,
            pairs,
            metric,
            ablation=ablation,
            denoising=denoising,
            memory_budget=memory_budget,
            batch_size=batch_size,
            neurons=neurons,
        )
        places = [None, *range(pairs.clean.shape[1])] if by_position else [None]
        effects, *alone = _effects(setting, places, memory_budget, batch_size, progress)
    check_effects(setting, effects)
    if denoising:
        effects.neg_()
    circuit = Circuit.of_effects(
        setting.sites.graph,
        effects,
        method="exact",
        metric=name_of(metric),
        details=setting.details(ablation),
        signed=not is_distance(metric),
    )
    if not by_position:
        return circuit
    per_position = torch.stack(alone, 1)
    return replace(circuit, per_position=-per_position if denoising else per_position)


def _effects(
    setting: Setting,
    places: Sequence[int | None],
    memory_budget: int | None,
    batch_size: int | None,
    progress: bool,
) -> list[Float[Tensor, "pair edge"]]:
    """Return the effects of every edge at all positions (None) or at one."""
    n_edges = setting.sites.graph.n_edges
    with tqdm(total=None, desc="exact patching", unit="edge", disable=not progress) as bar:
        if setting.blocks is None:
            if len(places) > 1:
                raise UnsupportedModel(f"patching by position runs the model part by part: {setting.why_whole}")
            alone = torch.eye(n_edges, dtype=torch.bool, device=setting.pairs.clean.device)
            found = whole_effects(
                setting, alone, memory_budget=memory_budget, batch_size=batch_size, advance=bar.update
            )
            check_finite(setting, found)
            return [found]
        out = [torch.zeros(len(setting.pairs), n_edges, device=setting.pairs.clean.device) for _ in places]
        batches = patchings(
            setting,
            lambda patching: (_at(patching, places[-1]).rehearse(), torch.empty(n_edges, len(patching.base))),
            # by position, they are put together at the end
            kept=4 * len(places) * len(setting.pairs) * n_edges * (1 if len(places) == 1 else 2),
            memory_budget=memory_budget,
            batch_size=batch_size,
        )
        for rows, patching in batches:
            for of_place, place in zip(out, places, strict=True):
                effects = _at(patching, place).edge_effects(bar.update)
                check_finite(setting, effects)
                of_place[rows] = effects.T.to(of_place.dtype)
            del patching  # before the next one is made
    return out


def _at(patching: Patching, place: int | None) -> Patching:
    """Return the run in which sources change at one position only."""
    if place is None:
        return patching
    changes = torch.zeros_like(patching.changes)
    if place < changes.shape[2]:
        changes[:, :, place] = patching.changes[:, :, place]
    return replace(patching, changes=changes)


def check_effects(setting: Setting, effects: Float[Tensor, "pair part"], *, moved: bool = False) -> None:
    """Check that the metric can be changed at all, where no effect on it is known: it may be a share of right answers.

    Raises:
        BadInput: it is the same on other logits.
    """
    if not (moved or bool(effects.any()) or _moves(setting)):
        raise BadInput(
            f"no ablation changes metric {name_of(setting.metric)} at all: expected one that depends on the logits "
            f"(and pairs whose answer hangs on what they change)"
        )


def _moves(setting: Setting) -> bool:
    """Whether some pair has another metric on the corrupt run, or, where that does not count, on reversed logits."""
    some = setting.pairs.take(torch.arange(min(len(setting.pairs), TRIED), device=setting.pairs.clean.device))
    with torch.no_grad():
        logits = setting.model(some.clean)
        others = logits.flip(-1) if setting.replaced is not None else setting.model(some.corrupt)
        return not torch.equal(*(measure(setting.metric, x, some) for x in (logits, others)))


def check_finite(setting: Setting, effects: Float[Tensor, "pair ..."]) -> None:
    """Check that effects are numbers.

    Raises:
        BadInput: one is not.
    """
    if not bool(torch.isfinite(effects).all()):
        raise BadInput(f"metric {name_of(setting.metric)} gave a number that is not finite: check it and the weights")
