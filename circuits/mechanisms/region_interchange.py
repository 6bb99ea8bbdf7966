"""Interchange by region: does an algorithm's variable work on one part of the operand square only?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import wilson_interval
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.interchange import Candidate, Candidates, Swap, along_directions, candidates, draw_swaps
from circuits.mechanisms.operand_parts import random_part
from circuits.mechanisms.readings import Readings, read
from circuits.mechanisms.thresholds import RULE
from circuits.tasks.base import Task

SWAPS = 4500
LEAVES, SMALLEST_LEAF = 16, 25
HOLDS = 0.93
PASSES, FAILS = RULE.region_inside, RULE.region_outside
"""Share of swaps that hold inside the region where it is chosen, and where it is judged; share outside at most."""
FEWEST = 40
SMALLEST, LARGEST = RULE.region_smallest, 1 - RULE.region_smallest
"""A region is at least, and at most, this share of the operand square."""
ALGORITHMS = {
    "fourier": ("frequencies",),
    "number-line": ("line",),
    "columns": ("low_digit_of_a", "high_digit_of_a"),
}
"""The variables that carry each algorithm, all of which have to work on the region."""


@dataclass(frozen=True, eq=False)
class Tried:
    """Swaps that count: base pairs, the pairs that the answer should be that of, and whether it is."""

    base: Int[Tensor, "rows 2"]
    moved: Int[Tensor, "rows 2"]
    holds: Bool[Tensor, " rows"]

    def take(self, rows: Tensor) -> Tried:
        """Some of the rows."""
        return Tried(self.base[rows], self.moved[rows], self.holds[rows])


@dataclass(frozen=True, eq=False)
class Region:
    """A part of the operand square: leaves of a decision tree over operands, their sum and difference."""

    tree: Any
    rates: tuple[Tensor, Tensor]
    leaves: frozenset[int]

    def contains(self, pairs: Int[Tensor, "rows 2"]) -> Bool[Tensor, " rows"]:
        """Which pairs lie inside."""
        found = self.tree.apply(_features(pairs, self.rates))
        return torch.from_numpy(np.isin(found, list(self.leaves)))


def _features(pairs: Int[Tensor, "rows 2"], rates: tuple[Tensor, Tensor]) -> Any:
    a, b = pairs.T
    return torch.stack([a, b, a + b, a - b, rates[0][a], rates[1][b]], dim=1).float().numpy()


def _value_rates(tried: Tried, n: int) -> tuple[Tensor, Tensor]:
    """Share of the swaps that hold by value of the first operand (before or after) and of the second."""
    out = []
    for values in (torch.cat([tried.base[:, 0], tried.moved[:, 0]]), tried.base[:, 1]):
        holds = tried.holds.repeat(len(values) // len(tried.holds)).double()
        count, hold = torch.bincount(values, minlength=n), torch.bincount(values, holds, minlength=n)
        out.append(((hold + holds.mean()) / (count + 1)).float())
    return out[0], out[1]


def find_region(first: Tried, second: Tried, n: int, *, seed: int) -> Region | None:
    """The region that best tells where swaps hold: a tree grown on both ends of each swap, leaves by falling share.

    Of the regions inside which swaps hold, the one with the widest gap to the outside: the largest of them would be
    a few lucky leaves where an algorithm's swaps fail now and then. The share of each operand value among the first
    swaps is a feature of the tree, so that values need not be neighbours to form a region. A swap lies inside where
    both of its pairs do.

    Source: classification trees: Breiman et al. 1984; scikit-learn's ``DecisionTreeClassifier``.
    """
    from sklearn.tree import DecisionTreeClassifier

    rates = _value_rates(first, n)
    ends, holds = torch.cat([second.base, second.moved]), second.holds.repeat(2).numpy()
    if len(np.unique(holds)) < 2:
        return None
    tree = DecisionTreeClassifier(max_leaf_nodes=LEAVES, min_samples_leaf=SMALLEST_LEAF, random_state=seed)
    tree.fit(_features(ends, rates), holds)
    at = [torch.from_numpy(tree.apply(_features(pairs, rates))) for pairs in (second.base, second.moved)]
    leaf, share = torch.cat(at), torch.from_numpy(holds).double()
    order = sorted(leaf.unique().tolist(), key=lambda i: -float(share[leaf == i].mean()))
    best, widest = None, 0.0
    for size in range(1, len(order)):
        kept = torch.tensor(order[:size])
        inside = torch.isin(at[0], kept) & torch.isin(at[1], kept)
        gap = _share(second.holds[inside]) - _share(second.holds[~inside])
        if int(inside.sum()) >= FEWEST // 2 and _share(second.holds[inside]) >= HOLDS and gap > widest:
            best, widest = frozenset(order[:size]), gap
    return None if best is None else Region(tree, rates, best)


def try_swaps(
    model: Any,
    task: Task,
    swap: Swap,
    at: Candidates,
    candidate: Candidate,
    component: Float[Tensor, "n d"] | None = None,
) -> Tried:
    """Swap the candidate's part of the state, or another, on every row, and keep the rows that count."""
    predicted = candidate.predict(swap)
    holds, counts = at.holds(model, task, swap, candidate, component)
    counts = counts.cpu()
    base = swap.base[counts]
    # the pair whose answer is predicted: with b as it is, the answer tells the first operand
    values = torch.arange(task.n_operand_values)
    every = torch.cartesian_prod(values, values)
    table = task.answer(every).reshape(len(values), -1)
    moved = (table[:, base[:, 1]] == predicted.cpu()[counts]).int().argmax(0)
    return Tried(base, torch.stack([moved, base[:, 1]], dim=1), holds.cpu())


def region_interchange(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Interchange accuracy of an algorithm's variables inside the region where they work, less that outside.

    For each algorithm whose variables work somewhere and not everywhere, a third of the swaps gives the share that
    hold by operand value, a third a decision tree whose leaves make up the region, and a third is judged: inside (both
    the base pair and the pair whose answer is predicted lie there) and outside. The control swaps the part that as
    many random functions of the operand explain, inside.

    A network passes that carries out an algorithm on one part of its inputs and does something else on the rest, with
    the right answers on both.

    Formula: I(inside) - I(outside), with I(S) the interchange accuracy (see interchange) over the swaps whose
        base pair and whose predicted pair both lie in S.

    Source: interchange accuracy of Geiger et al. 2021 (arXiv 2106.02997), definition 2; combinations of causal models
    by input: Pislar, Magliacane & Geiger 2025 (arXiv 2503.11429); the search for the region is ours.
    Fails when: a region is less than a twentieth of the square, or has a border that is no function of single operand
    values, their sum and their difference.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    swaps = draw_swaps(model, task, n=SWAPS, seed=seed + 7)
    thirds = [Swap(swaps.base[i::3], swaps.source[i::3], swaps.right[i::3]) for i in range(3)]
    at = candidates(model, task, readings, thirds[0], seed=seed)
    # both ways to part a state: where an algorithm lies over a list, one of them moves less of the list
    results = []
    for of in (at, along_directions(at)):
        by_name = {candidate.name: candidate for candidate in of.found}
        for algorithm, names in ALGORITHMS.items():
            if set(names) <= set(by_name):
                variables = [by_name[name] for name in names]
                results.append(_judged(model, task, readings, of, algorithm, variables, thirds, seed))
    if any(r["algorithm"] == "number-line" and r["inside"] >= PASSES for r in results):
        # one direction that carries the operand carries its digits too
        results = [r for r in results if r["algorithm"] != "columns"]
    best = max(results, key=lambda r: r["inside"] - r["outside"])
    low, high = wilson_interval(best.pop("hold"), max(best.pop("counted"), 1))
    enough = best["n_inside"] >= FEWEST and best["n_outside"] >= FEWEST and SMALLEST <= best["area"] <= LARGEST
    passed = enough and best["inside"] >= PASSES and best["outside"] <= FAILS and best["control"] <= FAILS
    return Evidence(
        test="region-interchange",
        value=best["inside"] - best["outside"],
        interval=(low - best["outside"], high - best["outside"]),
        control=best["control"],
        control_name="random functions of the operand, as many, inside",
        threshold=f"inside >= {PASSES}, outside <= {FAILS}, random functions <= {FAILS}, right on both",
        passed=passed and min(best["right_inside"], best["right_outside"]) >= RULE.region_right,
        details=best,
        source="Geiger et al. 2021, arXiv 2106.02997; Pislar et al. 2025, arXiv 2503.11429",
        seconds=time.perf_counter() - start,
    )


_COUNTS = ("hold", "counted", "n_inside", "n_outside")
_SHARES = ("inside", "outside", "control", "area", "right_inside", "right_outside", "complement")


def _judged(
    model: Any,
    task: Task,
    readings: Readings,
    at: Candidates,
    algorithm: str,
    variables: list[Candidate],
    thirds: list[Swap],
    seed: int,
) -> dict[str, Any]:
    """Find the region of the algorithm's first variable that has one, and judge all its variables there."""
    nothing: dict[str, Any] = {"algorithm": algorithm} | dict.fromkeys(_COUNTS, 0) | dict.fromkeys(_SHARES, 0.0)
    n = task.n_operand_values
    first = [try_swaps(model, task, thirds[0], at, v) for v in variables]
    rates = [float(t.holds.float().mean()) for t in first if len(t.holds)]
    if not rates or not FAILS * SMALLEST <= min(rates) < HOLDS:
        return nothing
    later = [[try_swaps(model, task, s, at, v) for s in thirds[1:]] for v in variables]
    tried = [[one, *others] for one, others in zip(first, later, strict=True)]
    region = find_region(tried[0][0], tried[0][1], n, seed=seed)
    if region is None:
        return nothing
    inside, outside = [], []
    control: list[Tensor] = []
    rest: list[Tensor] = []
    for variable, parts in zip(variables, tried, strict=True):
        judged = parts[2]
        within = region.contains(judged.base) & region.contains(judged.moved)
        inside.append(judged.holds[within])
        outside.append(judged.holds[~within])
        random = random_part(at.states, variable.rank, seed)
        for kept, part in ((control, random), (rest, at.states - variable.component)):
            again = try_swaps(model, task, thirds[2], at, variable, part)
            kept.append(again.holds[region.contains(again.base) & region.contains(again.moved)])
    operands, worst = readings.operands.cpu(), min(inside, key=_share)
    here, right = region.contains(operands), readings.right.cpu()
    return nothing | {
        "inside": min(_share(h) for h in inside),
        "outside": max(_share(h) for h in outside),
        "hold": int(worst.sum()),
        "counted": len(worst),
        "n_inside": min(len(h) for h in inside),
        "n_outside": min(len(h) for h in outside),
        "control": max(_share(h) for h in control),
        "complement": max(_share(h) for h in rest),
        "area": float(here.float().mean()),
        "right_inside": _share(right[here]),
        "right_outside": _share(right[~here]),
    }


def _share(holds: Bool[Tensor, " rows"]) -> float:
    return float(holds.float().mean()) if len(holds) else 0.0
