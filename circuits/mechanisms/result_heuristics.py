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
from circuits.mechanisms.heuristics import MODULI
from circuits.mechanisms.least_squares import class_means, r_squared
from circuits.mechanisms.readings import Readings, decisive_layers, read
from circuits.mechanisms.rectangles import accuracy_with, judged_rows, two_level_share
from circuits.mechanisms.thresholds import RULE
from circuits.tasks.base import Task

TOP_NEURONS = 512
"""So many neurons of a layer are looked at, the most important ones."""
SHORTEST = 3
"""A neuron that is on for fewer results decodes them and is no heuristic."""
SAME = 0.97
"""Share of results on which a neuron and a pattern have to agree."""
CLEAR = 0.9
"""Least share of a neuron that the result alone explains, and of what it does by result that two levels explain."""
OF_ENDS = 0.5
"""Most of the share of neurons that match which may be in ranges that touch an end of the results."""


@dataclass(frozen=True, eq=False)
class Profiles:
    """What each neuron does at each result: its mean there, whether it is on, and how much of it that explains."""

    mean: Float[Tensor, "result n"]
    on: Bool[Tensor, "result n"]
    explained: Float[Tensor, " n"]
    two_level: Float[Tensor, " n"]

    def of(self, some: Tensor) -> Profiles:
        """Those of some of the neurons."""
        return Profiles(self.mean[:, some], self.on[:, some], self.explained[some], self.two_level[some])


def profiles(labels: Int[Tensor, " rows"], neurons: Float[Tensor, "rows n"], n_results: int) -> Profiles:
    """Return each neuron's mean at each result, and how far the result alone and two levels explain the neuron."""
    mean = class_means(neurons, labels, n_results)
    levels = (mean.amax(0) + mean.amin(0)) / 2
    return Profiles(mean, mean > levels, r_squared(neurons, mean[labels]), two_level_share(mean))


def matched_kinds(
    on: Bool[Tensor, "result n"],
) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"], Bool[Tensor, " n"]]:
    """Return which neurons match a range of results, which a residue class, which a range that touches an end.

    By where they are on or where they are off. A range has results before and after it; one at an end may be a step of
    a magnitude code. A residue class is one of ``MODULI``. Each has three results or more.
    """
    changes = (on[1:] != on[:-1]).sum(0)
    number = torch.arange(len(on), device=on.device)
    classes = torch.stack([number % m == r for m in MODULI for r in range(m)])
    classes = classes[classes.sum(1) >= SHORTEST]
    inside, residue = torch.zeros_like(on[0]), torch.zeros_like(on[0])
    for pattern in (on, ~on):
        long = pattern.sum(0) >= SHORTEST
        inside |= long & (changes == 2) & ~pattern[0] & ~pattern[-1]
        agree = pattern.T.float() @ classes.T.float() + (~pattern).T.float() @ (~classes).T.float()
        residue |= long & (agree >= SAME * len(on)).any(1)
    end = (changes == 1) & (on.sum(0) >= SHORTEST) & ((~on).sum(0) >= SHORTEST)
    return inside, residue & ~inside, end & ~residue


def matching(
    on: Bool[Tensor, "result n"], clear: Bool[Tensor, " n"], weight: Float[Tensor, " n"]
) -> tuple[Bool[Tensor, " n"], dict[str, int]]:
    """Return which clear neurons match, and how many of each kind.

    Ranges at an end count where ranges inside and residues have no less weight: a bag of ranges has some, and
    proportionally more in small tables; a magnitude code has nothing else.
    """
    inside, residue, end = (clear & kind for kind in matched_kinds(on))
    others = inside | residue
    if float(weight[end].sum()) > OF_ENDS * float(weight[end | others].sum()):
        end = torch.zeros_like(end)
    counts = {"n_range": inside, "n_modulo": residue, "n_end": end}
    return others | end, {name: int(kind.sum()) for name, kind in counts.items()}


def result_heuristics(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Importance-weighted share of neurons that match a range or a residue of the answer, in the layer with most.

    A neuron counts if the answer alone explains it (R2 >= 0.9), by two levels (>= 0.9), and it is on at three or more
    results that form one range, or one residue class (``heuristics.MODULI``). Such a neuron cannot know the answer: it
    votes for everything that it matches. Ranges that touch an end of the results are also what a magnitude code has;
    they count where the others have at least half of the share. The neurons are then *idealised* (each replaced by its
    two levels), which accuracy must survive, and mean-ablated, which must hurt. The control renames the results at
    random, which keeps two levels but no range and no residue. Layers without which answers go wrong are looked at.

    Formula: sum over neurons i of importance_i [R2(h_i; function of the answer) >= 0.9, two-levelness >= 0.9,
        and {c: h_i on} is a range or a residue class of three or more results] / sum of importance_i.

    Source: range and modulo heuristics on the result: Nikankin et al. 2025 (arXiv 2410.21272), section 4 and
    appendix E; two-levelness, the floor on the number of results and idealisation are ours.
    Fails when: most ranges touch an end of the results, where they are steps of a magnitude code and count as none.
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
        clear = (found.explained >= CLEAR) & (found.two_level >= CLEAR)
        weight = readings.importance[top] / readings.importance[top].sum().clamp_min(1e-12)
        chosen, counts = matching(found.on, clear, weight)
        null, _ = matching(found.on[renamed], clear, weight)
        share = float(weight[chosen].sum())
        if share > best["share"]:
            best = {"share": share, "control": float(weight[null].sum()), "layer": layer, "neurons": top[chosen]}
            best |= {"weight": weight, "matches": chosen, "profiles": found, "counts": counts}
    details: dict[str, Any] = {"layer": best["layer"], "accuracy": float(readings.right.float().mean())}
    details |= best["counts"]
    passed = False
    if len(best["neurons"]):
        details |= _causal(model, task, readings, best["neurons"], best["profiles"].of(best["matches"]), seed=seed)
        kept = details["idealised"] >= details["accuracy"] - RULE.results_idealised
        needed = details["ablated"] <= RULE.results_ablated
        passed = best["share"] >= RULE.results_share and best["control"] <= RULE.results_renamed and kept and needed
    weighted = torch.stack([best["weight"] * best["matches"], best["weight"]], dim=1).cpu().numpy()
    return Evidence(
        test="result-heuristics",
        value=best["share"],
        interval=bootstrap_interval(weighted, lambda rows: rows[:, 0].sum() / max(rows[:, 1].sum(), 1e-12), seed=seed),
        control=best["control"],
        control_name="results renamed at random",
        threshold=f"share >= {RULE.results_share:.2f}, renamed <= {RULE.results_renamed:.2f}, accuracy survives "
        f"idealisation (-{RULE.results_idealised:.2f}), ablation leaves <= {RULE.results_ablated:.2f}",
        passed=passed,
        details=details,
        source="Nikankin et al. 2025, arXiv 2410.21272, section 4 and appendix E",
        seconds=time.perf_counter() - start,
    )


def _causal(
    model: Any, task: Task, readings: Readings, neurons: Int[Tensor, " k"], found: Profiles, *, seed: int
) -> dict[str, float]:
    """Accuracy with the neurons replaced by their two levels, and mean-ablated."""
    on, mean = found.on, found.mean
    high = (mean * on).sum(0) / on.sum(0).clamp_min(1)
    low = (mean * ~on).sum(0) / (~on).sum(0).clamp_min(1)
    rows = judged_rows(readings, seed=seed)
    levels = torch.where(on, high, low)[readings.labels[rows]]
    average = readings.neurons[:, neurons].mean(0).expand(len(rows), -1)
    return {
        "accuracy": float(readings.right[rows].float().mean()),
        "idealised": float(accuracy_with(model, task, readings, neurons, levels, rows).float().mean()),
        "ablated": float(accuracy_with(model, task, readings, neurons, average, rows).float().mean()),
    }
