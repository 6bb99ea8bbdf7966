"""The engine under every gradient method: first-order effects of all edges or sources from plain forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.activations import Store, gradients, outside_inference_mode, source_differences, values_at
from circuits.discovery.circuit import Circuit
from circuits.discovery.edge_products import RUNS, Product, edge_product, product_by_position
from circuits.discovery.gradient_rules import GradientRules, ruled_sites, rules_details, rules_of
from circuits.discovery.memory import pairs_at_a_time
from circuits.discovery.metrics import Metric, beside, check_pairs, is_distance, is_flat, name_of, select, zero_gradient
from circuits.discovery.sites import Sites, check_exact, sites_of
from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

Term = tuple[Mapping[str, Tensor] | None, Product]
"""A run whose gradients count: the activations that are put in place (None: the clean run), and what is made of it."""

Plan = Callable[[Sites, Store, Store], list[Term]]
"""From the activations of the corrupt and the clean run to the terms whose sum the scores are."""

REHEARSED = RUNS + 1
"""How many terms of a plan a rehearsal takes: after as many runs as are kept, memory grows no more."""


def integration_points(steps: int) -> list[float]:
    """Return the points k / steps for k = 1 ... steps, from near the corrupt input (0) to the clean one (1).

    Raises:
        BadInput: ``steps`` is less than 1.
    """
    if not isinstance(steps, int) or steps < 1:
        raise BadInput(f"steps = {steps}: expected a whole number of at least 1")
    return [k / steps for k in range(1, steps + 1)]


def edge_circuit(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric,
    points: Sequence[float],
    *,
    method: str,
    details: Mapping[str, Any] | None = None,
    rules: GradientRules | str | None = None,
    by_position: bool = False,
    neurons: bool = False,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Return the circuit whose scores are (a_corrupt - a_clean) . gradient at every edge, averaged over points.

    Args:
        model: The model.
        pairs: Clean and corrupt inputs.
        metric: One number per pair.
        points: Where gradients are taken and averaged: at t the token embedding is corrupt + t (clean - corrupt),
            so 1.0 is the clean run.
        method: The circuit's method.
        details: What the circuit records beside the pairs and the rules.
        rules: Where gradients depart from the chain rule: a set of ``RULES`` by name, or one's own.
        by_position: Whether to keep each token position's part of every score.
        neurons: Whether the neurons of MLPs are sources.
        memory_budget: Bytes that the computation may take beside the model.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Raises:
        BadInput: the pairs do not line up, the metric is constant, or a score is not finite.
        UnknownName: no set of rules has this name.
        UnsupportedModel: the model has a part that edges cannot represent, or that a rule cannot.
    """
    sites = sites_of(model, neurons=neurons)
    names = [f"edge {source} -> {reader}" for source, reader in sites.graph.edges]
    n_positions = pairs.clean.shape[1] if by_position else 1
    effects = effects_of(
        model,
        sites,
        pairs,
        metric,
        along_inputs(points, product_by_position if by_position else partial(edge_product, n_runs=len(points))),
        at=sites.reader_hooks,
        names=names * n_positions,
        rules=rules,
        memory_budget=memory_budget,
        batch_size=batch_size,
        progress=progress,
    )
    places = effects.unflatten(1, (n_positions, -1))
    circuit = Circuit.of_effects(
        sites.graph,
        places.sum(1) if by_position else effects,
        method=method,
        metric=name_of(metric),
        signed=not is_distance(metric),
        details={"pairs": len(pairs), "changed": pairs.changed, **(details or {})} | rules_details(rules),
    )
    return replace(circuit, per_position=places) if by_position else circuit


def source_effects(
    model: HookedModel,
    pairs: Pairs,
    metric: Metric,
    points: Sequence[float],
    *,
    rules: GradientRules | str | None = None,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> tuple[Sites, Float[Tensor, "pair source"]]:
    """Return the model's sites, and for each pair (a_corrupt - a_clean) . gradient of every source's output.

    Arguments and errors are those of ``edge_circuit``.
    """
    sites = sites_of(model)
    names = [f"source {source}" for source in sites.graph.sources]
    effects = effects_of(
        model,
        sites,
        pairs,
        metric,
        along_inputs(points, _source_product),
        at=sites.source_hooks,
        names=names,
        rules=rules,
        memory_budget=memory_budget,
        batch_size=batch_size,
        progress=progress,
    )
    return sites, effects


@outside_inference_mode
def effects_of(
    model: HookedModel,
    sites: Sites,
    pairs: Pairs,
    metric: Metric,
    plan: Plan,
    *,
    at: Sequence[str],
    names: Sequence[str],
    also: Sequence[str] = (),
    rules: GradientRules | str | None = None,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Float[Tensor, "pair score"]:
    """Return for each pair the sum of the terms of a plan: what every gradient method comes down to.

    Args:
        model: The model.
        sites: Its sources and readers.
        pairs: Clean and corrupt inputs.
        metric: One number per pair.
        plan: The runs whose gradients count, for a batch of pairs.
        at: The hooks at which gradients are taken, the last of them nearest to the logits.
        names: What each score is of, for errors.
        also: Hooks beside the sources' whose activations on the corrupt run the plan needs.
        rules: Where gradients depart from the chain rule: a set of ``RULES`` by name, or one's own.
        memory_budget: Bytes that the computation may take beside the model.
        batch_size: Pairs at a time, at most.
        progress: Whether to show a bar.

    Raises:
        BadInput: the pairs do not line up, the metric is constant, or a score is not finite.
        UnknownName: no set of rules has this name.
        UnsupportedModel: the model has a part that edges cannot represent, or that a rule cannot.
    """
    check_pairs(pairs)
    pairs, ruled = beside(model, pairs), rules_of(rules)
    sites = ruled_sites(sites, ruled)
    run = _Run(model, sites, metric, plan, tuple(at), names, tuple(also), ruled)
    kept = 4 * len(pairs) * len(names)
    slices = pair_slices(
        lambda n: run.terms(select(pairs, slice(n)), REHEARSED),
        sites,
        pairs,
        model.cfg,
        kept=kept,
        memory_budget=memory_budget,
        batch_size=batch_size,
    )
    out: Tensor | None = None
    largest, on_path, flat = 0.0, False, True
    for rows in tqdm(slices, desc="attribution", unit="batch", disable=not progress or len(slices) == 1):
        found = run.terms(select(pairs, rows))
        out = found.total.new_empty(len(pairs), len(names)) if out is None else out
        out[rows] = found.total
        largest, on_path, flat = max(largest, found.largest), found.on_path, flat and found.flat
    if largest == 0 or (flat and not on_path):
        raise BadInput(zero_gradient(metric, "every point of the path" if on_path else "the clean point"))
    assert out is not None  # there are pairs
    return out


class _Terms(NamedTuple):
    """What a batch of pairs gives."""

    total: Float[Tensor, "pair score"]
    largest: float
    """The largest gradient of the logits' input."""
    on_path: bool
    """Whether gradients were taken anywhere but at the clean point."""
    flat: bool
    """Whether there is none at the clean point."""


@dataclass(frozen=True, eq=False)
class _Run:
    """What ``effects_of`` was asked for, of whichever pairs."""

    model: HookedModel
    sites: Sites
    metric: Metric
    plan: Plan
    at: tuple[str, ...]
    names: Sequence[str]
    also: tuple[str, ...]
    rules: GradientRules | None

    def terms(self, part: Pairs, at_most: int | None = None) -> _Terms:
        """Return the sum of the plan's terms, or of the first of them, for some pairs."""
        corrupt = values_at(self.model, [*self.sites.source_hooks, *self.also], part.corrupt)
        plan: list[Term] = []

        def has_clean_term(values: Store) -> bool:
            check_exact(self.sites, values)
            plan.extend(self.plan(self.sites, corrupt, values))
            # whether rules take hold is seen in the backward of the clean run
            return self.rules is not None or any(replaced is None for replaced, _ in plan)

        clean, clean_grads, logits = self._gradients(part, None, has_clean_term)
        on_path = any(replaced is not None for replaced, _ in plan)
        flat = not on_path and is_flat(self.metric, logits, part)
        del logits
        total, largest = torch.zeros((), device=part.clean.device), 0.0
        for replaced, product in plan[:at_most]:
            values, grads = clean, clean_grads
            if replaced is not None:
                values, grads, _ = self._gradients(part, replaced)
            # the last hook lies nearest to the logits: without a gradient there, there is none anywhere
            largest = max(largest, float(grads[self.at[-1]].abs().max()))
            total = total + product(values, grads)
        total = total.expand(len(part), len(self.names))  # also where the plan has no terms
        if not bool(torch.isfinite(total).all()):
            raise BadInput(_not_finite(self.sites, total, self.names, corrupt, clean))
        return _Terms(total, largest, on_path, flat)

    def _gradients(
        self, part: Pairs, replaced: Mapping[str, Tensor] | None, needed: Callable[[Store], bool] | None = None
    ) -> tuple[Store, Store, Tensor]:
        return gradients(
            self.model,
            self.sites,
            part.clean,
            part,
            self.metric,
            at=self.at,
            replaced=replaced,
            rules=self.rules,
            needed=needed,
        )


def along_inputs(points: Sequence[float], prepare: Callable[[Sites, Store, Store], Product]) -> Plan:
    """Return the plan that averages over points between the corrupt (0) and the clean (1) token embeddings."""

    def plan(sites: Sites, corrupt: Store, clean: Store) -> list[Term]:
        product = prepare(sites, corrupt, clean)
        start, way = corrupt[sites.embed], clean[sites.embed] - corrupt[sites.embed]

        def mean(values: Store, grads: Store) -> Tensor:
            return product(values, grads) / len(points)

        return [(None if point == 1.0 else {sites.embed: start + point * way}, mean) for point in points]

    return plan


def pair_slices(
    rehearse: Callable[[int], object],
    sites: Sites,
    pairs: Pairs,
    cfg: Any,
    *,
    kept: int,
    memory_budget: int | None,
    batch_size: int | None,
) -> list[slice]:
    """Return which pairs to take at a time: what the memory budget allows, ``batch_size`` of them at most.

    Arguments and errors are those of ``pairs_at_a_time``.
    """
    readers = len(sites.graph.readers) // len(sites.layers)
    per_position = (len(sites.graph.sources) + readers) * cfg.d_model + 4 * (getattr(cfg, "d_vocab", None) or 0)
    size = pairs_at_a_time(
        rehearse,
        len(pairs),
        memory_budget=memory_budget,
        kept=kept,
        batch_size=batch_size,
        estimate=4 * len(pairs) * pairs.clean.shape[1] * per_position,
    )
    return [slice(i, i + size) for i in range(0, len(pairs), size)]


def _source_product(sites: Sites, corrupt: Store, clean: Store) -> Product:
    """Prepare the product of each source's difference with the gradient at its output, heads by their z."""

    def product(values: Store, grads: Store) -> Float[Tensor, "batch source"]:
        columns: list[Tensor] = []
        for name in sites.source_hooks:
            dtype = torch.promote_types(clean[name].dtype, torch.float32)
            along = ((corrupt[name] - clean[name]).to(dtype) * grads[name].to(dtype)).sum((1, -1))
            columns.append(along if along.ndim == 2 else along[:, None])
        return torch.cat(columns, 1)

    return product


def _not_finite(
    sites: Sites, effects: Float[Tensor, "batch score"], names: Sequence[str], corrupt: Store, clean: Store
) -> str:
    for name, difference in zip(sites.graph.sources, source_differences(sites, corrupt, clean), strict=True):
        if not bool(torch.isfinite(difference).all()):
            return f"the output of source {name} is not finite: check the model's weights"
    first = int((~torch.isfinite(effects).all(0)).nonzero()[0])
    return (
        f"the score of {names[first]} is not finite although every source is: check the metric, and the weights behind "
        f"its reader, the unembedding's among them"
    )
