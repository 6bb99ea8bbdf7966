"""Heuristic taxonomy: which neurons match a range, a residue, a pattern or a few results, and how many would anyway?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits._stats import bootstrap_interval
from circuits.errors import UnsupportedModel
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.heuristics import KINDS, Matches, Ranks, match, ranks
from circuits.mechanisms.readings import Readings, read, varies
from circuits.tasks.base import Task

TOP_NEURONS = 200
RENAMINGS = 6
"""Permutations of the operand tokens. One of few can happen to put all neurons' ranges onto a pattern."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """The neurons that were looked at, most important first, and what they match."""

    neurons: Int[Tensor, " k"]
    key_ranks: Ranks
    both_ends: bool
    matches: Matches


def value_vectors(model: Any, task: Task, layers: tuple[int, ...]) -> Float[Tensor, "neurons n_answers"]:
    """What each MLP neuron adds to the logits of the task's answers per unit of activation, less the mean over them.

    ``layers`` are the layers with an MLP; what later layers do to a neuron's output is not followed.

    Source: the value of key-value memories, W_out W_U: Nikankin et al. 2025 (arXiv 2410.21272), section 4.1.
    """
    if not hasattr(model, "unembed"):
        raise UnsupportedModel(f"{type(model).__name__} has no unembed.W_U, by which neurons vote for answers")
    unembedding = model.unembed.W_U[:, task.answer_tokens.to(model.unembed.W_U.device)]
    votes = torch.cat([model.blocks[layer].mlp.W_out @ unembedding for layer in layers]).detach().float()
    return votes - votes.mean(1, keepdim=True)


def labelled(model: Any, task: Task, readings: Readings) -> Labelled:
    """Return the most important neurons and the heuristics that they match; worked out once for all tests."""
    if "taxonomy" not in readings.remembered:
        top = readings.importance.argsort(descending=True)[:TOP_NEURONS]
        top = top[varies(readings.neurons[:, top])]
        keys, both_ends = ranks(readings.neurons[:, top]), bool((readings.neurons[:, top] < 0).any())
        results = task.answer_values.to(readings.labels.device)[readings.labels]
        contributions = _contributions(model, task, readings, top, results)
        matches = match(keys, contributions, readings.operands, results, both_ends=both_ends)
        readings.remembered["taxonomy"] = Labelled(top, keys, both_ends, matches)
    found: Labelled = readings.remembered["taxonomy"]
    return found


def _contributions(
    model: Any, task: Task, readings: Readings, neurons: Int[Tensor, " k"], results: Int[Tensor, " rows"]
) -> Float[Tensor, "rows k"]:
    """Key-value maps: each activation times the neuron's vote for a result."""
    votes = value_vectors(model, task, tuple(sorted(set(readings.layers))))[neurons]
    labels = torch.searchsorted(task.answer_values.to(results.device), results)
    return readings.neurons[:, neurons] * votes.T[labels]


def renamed_matches(model: Any, task: Task, readings: Readings, *, seed: int) -> Matches:
    """Matches of a network whose operand tokens have been permuted: it fires as before, but on other numbers.

    What neurons vote for stays as it is, so that whatever their votes match alone is matched here too.
    """
    found = labelled(model, task, readings)
    generator = torch.Generator().manual_seed(seed)
    renaming = torch.randperm(task.n_operand_values, generator=generator).to(readings.operands.device)
    operands = renaming[readings.operands]
    results = task.answer(operands)
    contributions = _contributions(model, task, readings, found.neurons, results)
    return match(found.key_ranks, contributions, operands, results, both_ends=found.both_ends)


def matched_shares(
    matches: Matches, nulls: Sequence[Matches], importance: Float[Tensor, " neurons"], *, seed: int = 0
) -> dict[str, float]:
    """Return the importance-weighted share of neurons that match a heuristic, with its interval over neurons.

    ``matched`` with ``low`` and ``high``; ``control``, the mean over ``nulls``; ``excess`` of the first over the second
    with ``excess_low`` and ``excess_high``; ``raw`` and ``raw_control`` by the score that is not corrected for chance.
    Not-a-number without neurons.

    Args:
        matches: what the neurons match.
        nulls: what they match under other names of the operands.
        importance: weight of each neuron.
        seed: of the bootstrap.

    Source: as ``taxonomy``.
    """
    if not len(importance):
        nan = float("nan")
        names = ("matched", "control", "excess", "raw", "raw_control", "low", "high", "excess_low", "excess_high")
        return dict.fromkeys(names, nan)
    weight = importance / importance.sum().clamp_min(1e-12)
    real = matches.classified().float()
    null, raw_null = (
        torch.stack([yes.float() for yes in each]).mean(0)
        for each in ([n.classified() for n in nulls], [n.classified_raw() for n in nulls])
    )
    data = torch.stack([weight * real, weight * (real - null), weight], 1).cpu().numpy()
    low, high = bootstrap_interval(data, lambda rows: rows[:, 0].sum() / max(rows[:, 2].sum(), 1e-12), seed=seed)
    excess_low, excess_high = bootstrap_interval(
        data, lambda rows: rows[:, 1].sum() / max(rows[:, 2].sum(), 1e-12), seed=seed
    )
    shares = {"matched": real, "control": null, "excess": real - null}
    shares |= {"raw": matches.classified_raw().float(), "raw_control": raw_null}
    intervals = {"low": low, "high": high, "excess_low": excess_low, "excess_high": excess_high}
    return {name: float(weight @ yes) for name, yes in shares.items()} | intervals


def taxonomy(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Importance-weighted share of neurons that match a heuristic of Nikankin et al., beyond renamed operands.

    A neuron matches a heuristic if, among as many of its highest prompts as the heuristic is about, the share that it
    is about exceeds chance by half of what it could: (score - base) / (1 - base) >= 0.5. Heuristics on operands are
    matched on the map of activations, those on the result on the map of contributions to the right answer. The value
    is the share that matches, less the mean share that matches when the operand tokens are permuted, so that it is
    about zero of an untrained network; the control is the same statistic of the median permutation against the others.
    ``matched`` and ``renamed`` are the two shares, ``renamed_most`` that of the permutation that matches most. ``raw``
    and ``raw_renamed`` are the published measure (score >= 0.6, no correction): on tables of this size it says yes to
    everything, trained or not.

    It does not decide, even corrected: a number line's hinges are ranges at an end of the table, a column code's
    neurons match residues, and cells of a range lookup (a in R and b in R') are not in the taxonomy at all unless R
    and R' are the same. By this measure alone an algorithm can be more heuristic than a lookup.

    Formula: sum_i importance_i [neuron i matches] / sum_i importance_i, less the mean of the same over permuted
        operand tokens; i matches where max over heuristics of (score - base) / (1 - base) >= 0.5, score the
        share of its top prompts that the heuristic is about and base the share of all prompts.

    Source: Nikankin et al. 2025 (arXiv 2410.21272), algorithm 1, section 4.1 and appendices E and F; correction for
    chance, ties, weights by importance and the null are ours. Patterns are read off each neuron's own top prompts, as
    in the code published with it (``heuristics.own_patterns``).
    Fails when: a few prompts carry a neuron (its top prompts are then ties), or the answer passes through later layers
    (a neuron's votes are its direct ones).
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    found = labelled(model, task, readings)
    importance = readings.importance[found.neurons]
    nulls = [renamed_matches(model, task, readings, seed=seed + i) for i in range(RENAMINGS)]
    shares = matched_shares(found.matches, nulls, importance, seed=seed)
    weight = importance / importance.sum().clamp_min(1e-12)
    each = torch.stack([weight @ null.classified().float() for null in nulls])
    median = int(each.argsort()[len(nulls) // 2])
    details: dict[str, Any] = {
        "matched": shares["matched"],
        "renamed": shares["control"],
        "renamed_most": float(each.max()),
        "raw": shares["raw"],
        "raw_renamed": shares["raw_control"],
        **{
            kind.replace(" ", "_").replace("-", "_"): float(weight @ found.matches.of_kind(kind).float())
            for kind in KINDS
        },
        "most_frequent": _most_frequent(found.matches),
        "n_heuristics": len(found.matches.heuristics.names),
        "n_neurons": len(found.neurons),
        "importance_covered": float(importance.sum() / readings.importance.sum().clamp_min(1e-12)),
    }
    return Evidence(
        test="taxonomy",
        value=shares["excess"],
        interval=(shares["excess_low"], shares["excess_high"]),
        control=float(each[median] - (each.sum() - each[median]) / (len(nulls) - 1)),
        control_name="the median permutation of the operand tokens against the others",
        threshold="none: algorithms match as well (match at a corrected score >= 0.50)",
        passed=None,
        details=details,
        source="Nikankin et al. 2025, arXiv 2410.21272, algorithm 1 and appendix E",
        seconds=time.perf_counter() - start,
    )


def _most_frequent(matches: Matches, n: int = 10) -> list[str]:
    """The heuristics that most neurons match, with how many do."""
    count = matches.matched().sum(0)
    order = count.argsort(descending=True, stable=True)[:n]
    return [f"{matches.heuristics.names[i]} ({int(count[i])})" for i in order.tolist() if int(count[i])]
