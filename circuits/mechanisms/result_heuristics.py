"""Heuristics on the result: neurons that each match a range or a residue of the answer and vote for all of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import bootstrap_interval
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.least_squares import r_squared
from circuits.mechanisms.readings import Readings, decisive_layers, read
from circuits.mechanisms.rectangles import accuracy_with, two_level_share
from circuits.tasks.base import Task

TOP_NEURONS = 512
MODULI = tuple(range(2, 11))
SHORTEST = 3
"""A neuron that is on for fewer results decodes them and is no heuristic."""
SAME = 0.97
"""Share of results on which a neuron and a pattern have to agree."""


@dataclass(frozen=True, eq=False)
class Profiles:
    """What each neuron does at each result: its mean there, whether it is on, and how much of it that explains."""

    mean: Float[Tensor, "result n"]
    on: Bool[Tensor, "result n"]
    explained: Float[Tensor, " n"]
    two_level: Float[Tensor, " n"]


def profiles(labels: Int[Tensor, " rows"], neurons: Float[Tensor, "rows n"], n_results: int) -> Profiles:
    """Return each neuron's mean at each result, and how far the result alone and two levels explain the neuron."""
    count = torch.bincount(labels, minlength=n_results).clamp_min(1)[:, None].to(neurons)
    mean = torch.zeros(n_results, neurons.shape[1], device=neurons.device).index_add_(0, labels, neurons) / count
    levels = (mean.amax(0) + mean.amin(0)) / 2
    return Profiles(mean, mean > levels, r_squared(neurons, mean[labels]), two_level_share(mean))


def matched_kinds(on: Bool[Tensor, "result n"]) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
    """Return which neurons match a range of results, and which a residue class, by where they are on or where off.

    A range has results before and after it, or it would be one step of a magnitude code; a residue class is one
    modulo 2 to 10. Either has three results or more.
    """
    changes = (on[1:] != on[:-1]).sum(0)
    number = torch.arange(len(on), device=on.device)
    classes = torch.stack([number % m == r for m in MODULI for r in range(m)])
    inside, residue = torch.zeros_like(on[0]), torch.zeros_like(on[0])
    for pattern in (on, ~on):
        long = pattern.sum(0) >= SHORTEST
        inside |= long & (changes == 2) & ~pattern[0] & ~pattern[-1]
        same = (pattern.T[:, None] == classes[None]).float().mean(-1)
        residue |= long & (same.amax(1) >= SAME)
    return inside, residue & ~inside


def result_heuristics(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Importance-weighted share of neurons that match a range or a residue of the answer, in the layer with most.

    A neuron counts if the answer alone explains it (R2 >= 0.9), by two levels (>= 0.9), and it is on at three or more
    results that form one range inside the table, or one residue class modulo 2 to 10. Such a neuron cannot know the
    answer: it votes for everything that it matches. The neurons are then *idealised* (each replaced by its two levels),
    which accuracy must survive, and mean-ablated, which must hurt. The control renames the results at random, which
    keeps two levels but no range and no residue. Layers without which answers go wrong are looked at.

    Source: range and modulo heuristics on the result: Nikankin et al. 2025 (arXiv 2410.21272), section 4 and
    appendix E; two-levelness, the floor on the number of results and idealisation are ours.
    Fails when: ranges touch an end of the table, where they are steps of a magnitude code and count as none.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    n_results = len(task.answer_values)
    generator = torch.Generator().manual_seed(seed)
    renamed = torch.randperm(n_results, generator=generator).to(readings.labels.device)
    layers = torch.tensor(readings.layers, device=readings.labels.device)
    best: dict[str, Any] = {"share": -1.0}
    for layer in decisive_layers(model, task, readings):
        mine = (layers == layer).nonzero().flatten()
        top = mine[readings.importance[mine].argsort(descending=True)[:TOP_NEURONS]]
        found = profiles(readings.labels, readings.neurons[:, top], n_results)
        clear = (found.explained >= 0.9) & (found.two_level >= 0.9)
        inside, residue = matched_kinds(found.on)
        chosen, null = clear & (inside | residue), clear & torch.stack(matched_kinds(found.on[renamed])).any(0)
        weight = readings.importance[top] / readings.importance[top].sum().clamp_min(1e-12)
        share = float(weight[chosen].sum())
        if share > best["share"]:
            best = {"share": share, "control": float(weight[null].sum()), "layer": layer, "neurons": top[chosen]}
            best |= {"weight": weight, "matches": chosen, "profiles": found}
            best |= {"n_range": int((clear & inside).sum()), "n_modulo": int((clear & residue).sum())}
    details: dict[str, Any] = {"layer": best["layer"], "accuracy": float(readings.right.float().mean())}
    details |= {name: best[name] for name in ("n_range", "n_modulo")}
    passed = False
    if len(best["neurons"]):
        details |= _causal(model, task, readings, best["neurons"], best["profiles"], best["matches"])
        survives = details["idealised"] >= details["accuracy"] - 0.05 and details["ablated"] <= 0.7
        passed = best["share"] >= 0.75 and best["control"] <= 0.1 and survives
    weighted = torch.stack([best["weight"] * best["matches"], best["weight"]], dim=1).cpu().numpy()
    return Evidence(
        test="result-heuristics",
        value=best["share"],
        interval=bootstrap_interval(weighted, lambda rows: rows[:, 0].sum() / max(rows[:, 1].sum(), 1e-12), seed=seed),
        control=best["control"],
        control_name="results renamed at random",
        threshold="share >= 0.75, renamed <= 0.10, accuracy survives idealisation (-0.05), ablation leaves <= 0.70",
        passed=passed,
        details=details,
        source="Nikankin et al. 2025, arXiv 2410.21272, section 4 and appendix E",
        seconds=time.perf_counter() - start,
    )


def _causal(
    model: Any, task: Task, readings: Readings, neurons: Int[Tensor, " k"], found: Profiles, matches: Bool[Tensor, " n"]
) -> dict[str, float]:
    """Accuracy with the neurons replaced by their two levels, and mean-ablated."""
    on, mean = found.on[:, matches], found.mean[:, matches]
    high = (mean * on).sum(0) / on.sum(0).clamp_min(1)
    low = (mean * ~on).sum(0) / (~on).sum(0).clamp_min(1)
    levels = torch.where(on, high, low)[readings.labels]
    average = readings.neurons[:, neurons].mean(0).expand(len(readings.labels), -1)
    return {
        "idealised": float(accuracy_with(model, task, readings, neurons, levels).float().mean()),
        "ablated": float(accuracy_with(model, task, readings, neurons, average).float().mean()),
    }
