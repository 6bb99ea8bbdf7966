"""Lookup of pairs: neurons that each know one pair of operands, and the answers that go with them."""

from __future__ import annotations

import time
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import bootstrap_interval
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.functional_form import circle_length
from circuits.mechanisms.groups import operation_of
from circuits.mechanisms.neuron_forms import neuron_forms, renamed_wave_share
from circuits.mechanisms.readings import Readings, answer_logits, decisive_layers, read, varies
from circuits.mechanisms.thresholds import RULE
from circuits.tasks.base import Task

HALF = 0.5
"""Share of the most that a neuron leaves its median by, beyond which it is on."""
CHUNK = 2048
"""So many neurons are looked at together, and so many unknown inputs are answered."""
OTHERS, FEWEST = 128, 64
"""So many of the most important other neurons are fitted elsewhere, where there are so many inputs or more."""


def knows_pairs(operands: Int[Tensor, "rows 2"], neurons: Float[Tensor, "rows n"]) -> Bool[Tensor, "rows n"]:
    """Return where each neuron knows its pair: all false for neurons that are not about one unordered pair.

    A neuron is about a pair if it leaves its median, by more than half of the most that it does, only on (s, t), on
    (t, s), or on both, and on the doubles (s, s) and (t, t), which neurons that read a sum of both operands cannot
    tell from them.
    """
    away = (neurons - neurons.median(0).values).abs()
    most = away.amax(0)
    on = away > HALF * most
    a, b = operands[:, :1], operands[:, 1:]
    # a double does not tell which pair it is a part of
    apart = on & (a != b)
    first = torch.where(apart.any(0), apart.int().argmax(0), on.int().argmax(0))
    s, t = operands[first].T
    of_pair = ((a == s) | (a == t)) & ((b == s) | (b == t))
    clear = (most > 1e-6 * neurons.abs().amax(0)) & ~(on & ~of_pair).any(0)
    return on & clear


def pair_lookup(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Share of the right answers that are lost with the neurons that know their pair, beside that with as many others.

    Each neuron of the decisive layers that fires on one unordered pair of operands alone is found; for every input,
    those that fire on it are set to their median. Whoever remembers pairs then does not know the answer, and whoever
    computes it has no such neurons. The control takes from each input the neurons that know another pair.

    ``overrules`` is about inputs that no neuron knows: how often, given what the neurons of a random known pair do,
    the answer is that pair's. A list may lie over an algorithm that would answer rightly without it; then nothing is
    lost with its neurons, and yet they decide. Where some pairs have neurons of their own and others have none,
    ``elsewhere_frequency`` and ``elsewhere_hinge`` are the shares of the other neurons' importance that are waves of a
    single frequency, or sums of hinges, on the pairs that no neuron knows: what answers those. On the whole square such
    neurons fit nothing, where the list's part of it is shut off from them. ``elsewhere_renamed`` is the share of waves
    when the operands are renamed at random.

    Formula: mean over rightly answered (a, b) of [the answer is wrong once every neuron that fires on {a, b}
        alone is at its median over all inputs].

    Source: ours; memorisation before grokking: Power et al. 2022 (arXiv 2201.02177), section 3.
    Fails when: pairs are remembered by combinations of neurons, none of which stands for one pair.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    layers = torch.tensor(readings.layers, device=readings.labels.device)
    decisive = torch.isin(layers, torch.tensor(decisive_layers(model, task, readings), device=layers.device))
    knows = torch.zeros_like(readings.neurons, dtype=torch.bool)
    for chunk in decisive.nonzero().flatten().split(CHUNK):
        knows[:, chunk] = knows_pairs(readings.operands, readings.neurons[:, chunk])
    right = readings.right
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(right), generator=generator).to(right.device)
    lost, control = torch.zeros_like(right), torch.zeros_like(right)
    if bool(knows.any()):
        medians = readings.neurons.median(0).values
        lost = right & ~_right_without(model, task, readings, knows, medians, layers)
        control = right & ~_right_without(model, task, readings, knows[order], medians, layers)
    lost, control = lost[right], control[right]
    overrules = _overrules(model, task, readings, knows, layers, generator)
    share = float(lost.float().mean()) if len(lost) else 0.0
    other = float(control.float().mean()) if len(control) else 0.0
    return Evidence(
        test="pair-lookup",
        value=share,
        interval=bootstrap_interval(lost.float().cpu().numpy(), seed=seed) if len(lost) else (0.0, 0.0),
        control=other,
        control_name="neurons that know another pair",
        threshold=f"share >= {RULE.pairs_share:.2f} and another pair's neurons <= {RULE.pairs_other:.2f}",
        passed=share >= RULE.pairs_share and other <= RULE.pairs_other,
        details={
            "n_pair_neurons": int(knows.any(0).sum()),
            "known_pairs": float(knows.any(1).float().mean()),
            "overrules": overrules,
            "importance": float(readings.importance[knows.any(0)].sum() / readings.importance.sum().clamp_min(1e-12)),
            **_elsewhere(model, task, readings, knows, decisive, seed),
        },
        source="ours",
        seconds=time.perf_counter() - start,
    )


def _elsewhere(
    model: Any, task: Task, readings: Readings, knows: Bool[Tensor, "rows n"], decisive: Tensor, seed: int
) -> dict[str, float]:
    """What the other neurons of decisive layers are on the inputs that no neuron knows; nothing without a list."""
    known = float(knows.any(1).float().mean())
    bare = (~knows.any(1)).nonzero().flatten()
    if not RULE.list_known <= known <= 1 - RULE.list_known or len(bare) < FEWEST or operation_of(task) is None:
        return {}
    operands, mine = readings.operands[bare], (decisive & ~knows.any(0)).nonzero().flatten()
    mine = mine[varies(readings.neurons[bare][:, mine])] if len(mine) else mine
    mine = mine[readings.importance[mine].argsort(descending=True)[:OTHERS]]
    importance = readings.importance[mine]
    if not bool((importance > 0).any()):
        return {}
    neurons = readings.neurons[bare][:, mine]
    circle = circle_length(model, task, readings, seed=seed)
    forms = neuron_forms(task, operands, neurons, seed=seed, circle=circle)
    renaming = torch.randperm(task.n_operand_values, generator=torch.Generator().manual_seed(seed))
    renamed = renaming.to(operands.device)[operands]
    return {
        "elsewhere_frequency": forms.frequency_share(importance),
        "elsewhere_hinge": forms.shares(importance)["hinge"],
        "elsewhere_renamed": renamed_wave_share(task, renamed, [neurons], importance, seed=seed, circle=circle),
    }


def _overrules(
    model: Any,
    task: Task,
    readings: Readings,
    knows: Bool[Tensor, "rows n"],
    layers: Tensor,
    generator: torch.Generator,
) -> float:
    """How often the neurons of a random known pair make an unknown input's answer theirs."""
    known, bare = knows.any(1).nonzero().flatten(), (~knows.any(1)).nonzero().flatten()[:CHUNK]
    if not len(known) or not len(bare):
        return float("nan")
    source = known[torch.randint(len(known), (len(bare),), generator=generator).to(known.device)]
    said = _answers(model, task, readings, bare, knows[source], readings.neurons[source], layers)
    differ = readings.labels[source] != readings.labels[bare]
    return float((said == readings.labels[source])[differ].float().mean())


def _right_without(
    model: Any, task: Task, readings: Readings, off: Bool[Tensor, "rows n"], medians: Tensor, layers: Tensor
) -> Bool[Tensor, " rows"]:
    """Which rows are right with some neurons, other ones on each row, at their median."""
    every = torch.arange(len(off), device=off.device)
    return _answers(model, task, readings, every, off, medians.expand(len(off), -1), layers) == readings.labels


def _answers(
    model: Any,
    task: Task,
    readings: Readings,
    rows: Int[Tensor, " rows"],
    chosen: Bool[Tensor, "rows n"],
    values: Float[Tensor, "rows n"],
    layers: Tensor,
) -> Int[Tensor, " rows"]:
    """The answers on some rows, with some neurons, other ones on each row, at given values."""
    out = []
    for part in torch.arange(len(rows), device=rows.device).split(4096):
        hooks = []
        for layer in sorted(set(readings.layers)):
            mine = layers == layer

            def put(
                activation: Tensor, hook: Any, mine: Tensor = chosen[part][:, mine], to: Tensor = values[part][:, mine]
            ) -> Tensor:
                activation = activation.clone()
                activation[:, -1] = torch.where(mine, to.to(activation.dtype), activation[:, -1])
                return activation

            hooks.append((f"blocks.{layer}.mlp.hook_post", put))
        out.append(answer_logits(model, task, readings.tokens[rows[part]], hooks, cheap=True).argmax(-1))
    return torch.cat(out)
