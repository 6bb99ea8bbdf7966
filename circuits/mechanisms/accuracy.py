"""Accuracy gate: has the task been learned, and does what was learned reach unseen inputs?"""

from __future__ import annotations

import time
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits._decoding import greedy_right
from circuits._stats import wilson_interval
from circuits.errors import BadInput
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.readings import has_one_answer_token
from circuits.tasks.base import SPLITS, Task

MOST_LISTED = 10**6
"""Training pairs up to which they are listed to find mirror images among them."""


def commutes(task: Task) -> bool:
    """Whether exchanging the operands leaves the answer as it is."""
    probe = torch.tensor([[1, 0], [2, 1], [3, 1]]) % task.n_operand_values
    return bool((task.answer(probe) == task.answer(probe.flip(1))).all())


def mirror_trained(task: Task, operands: Int[Tensor, "rows 2"]) -> Bool[Tensor, " rows"] | None:
    """Whether (b, a) is a training pair, for each pair (a, b); None for a task that can neither tell nor list them."""
    mirrored, n = operands.flip(1), task.n_operand_values
    in_split = getattr(task, "in_split", None)
    if in_split is not None:
        asked: Tensor = in_split(mirrored, "train")
        return asked
    if task.split_size("train") > MOST_LISTED:
        return None
    members = task.examples("train").operands
    return torch.isin(mirrored[:, 0] * n + mirrored[:, 1], members[:, 0] * n + members[:, 1])


def judged(task: Task) -> int:
    """How many pairs of a split are judged where nothing else is asked for: half as many where answers are decoded."""
    return 2048 if has_one_answer_token(task) else 1024


def accuracy_gate(model: Any, task: Task, *, seed: int = 0, limit: int | None = None) -> Evidence:
    """Accuracy on unseen random pairs, with train and block accuracy and the share that symmetry alone explains.

    A network that reads its operands through symmetric weights knows (b, a) once it was trained on (a, b). Held-out
    pairs whose mirror image was trained on are therefore no evidence of an algorithm where the operation commutes:
    ``unmirrored`` is the accuracy on the others, with its interval ``unmirrored_low`` to ``unmirrored_high``: of small
    tables few pairs are left, and luck can make a share of them right (where none is left, ``n_unmirrored`` is 0 and
    the figures are those of all unseen pairs). Where sums have carry cascades, ``without_cascade`` is the accuracy on
    unseen pairs that have none. ``chance``, the most frequent answer of the unseen pairs, is the control.

    Formula: acc(S) = mean over (a, b) in S of [argmax_c logit_c(a, b) = answer(a, b)], for S the training
        pairs, the unseen random pairs (``value``), the held-out block; ``unmirrored``: those (a, b) of the
        unseen with (b, a) unseen too.

    Source: the split by mirror image is ours; chance level and Wilson interval are standard.
    Fails when: the held-out split is empty; a task that cannot say which pairs it trains on, and has over a million.
    """
    start = time.perf_counter()
    limit = limit or judged(task)
    details: dict[str, Any] = {}
    right: dict[str, Tensor] = {}
    operands: dict[str, Tensor] = {}
    for split in SPLITS:
        if task.split_size(split) == 0:
            continue
        batch = task.examples(split, limit=min(limit, task.split_size(split)), seed=seed)
        right[split], operands[split] = greedy_right(model, task, batch).to("cpu"), batch.operands
        details[split] = float(right[split].float().mean())
    if "random" not in right or "train" not in right:
        raise BadInput(
            f"{task.name} has no {'training' if 'train' not in right else 'random held-out'} pairs: without unseen "
            "pairs beside the training pairs nothing shows what was learned; split the task, as by train_fraction = 0.8"
        )
    held, pairs = right["random"], operands["random"]
    if hasattr(task, "cascade_length"):
        short = task.cascade_length(pairs) == 0
        details["without_cascade"] = float(held[short].float().mean()) if bool(short.any()) else float("nan")
    mirrored = mirror_trained(task, pairs) if commutes(task) else None
    alone = torch.ones_like(held) if mirrored is None else ~mirrored
    unmirrored = held[alone] if bool(alone.any()) else held
    low, high = wilson_interval(int(unmirrored.sum()), len(unmirrored))
    answers = task.answer(pairs)
    chance = float(torch.bincount(answers - answers.min()).max()) / len(answers)
    details |= {
        "unmirrored": float(unmirrored.float().mean()),
        "unmirrored_low": low,
        "unmirrored_high": high,
        "n_random": len(held),
        "n_unmirrored": int(alone.sum()),
        "chance": chance,
    }
    return Evidence(
        test="accuracy-gate",
        value=details["random"],
        interval=wilson_interval(int(held.sum()), len(held)),
        control=chance,
        control_name="most frequent answer",
        threshold="train accuracy >= 0.95 and accuracy on unseen random pairs >= 0.95",
        passed=details["train"] >= 0.95 and details["random"] >= 0.95,
        details=details,
        source="held-out accuracy with Wilson interval",
        seconds=time.perf_counter() - start,
    )


def block_gap(model: Any, task: Task, *, seed: int = 0, limit: int | None = None) -> Evidence:
    """Accuracy on random unseen pairs minus accuracy on a contiguous block of operand pairs never trained on.

    Whoever computes the answer loses nothing inside the block; whoever interpolates between neighbouring training
    pairs does. The control is the same difference between two halves of the random held-out pairs.

    Formula: acc(unseen random pairs) - acc(held-out block), acc as in accuracy-gate.

    Source: contiguous hold-outs as a test of local interpolation; interval by the difference of two Wilson intervals
    (Newcombe 1998, method 10).
    Fails when: the block is so small that its interval spans both thresholds (``passed`` is then None).
    """
    start = time.perf_counter()
    limit = limit or judged(task)
    result: dict[str, tuple[int, int]] = {}
    halves = (0.0, 0.0)
    for split in ("random", "block"):
        size = task.split_size(split)
        batch = task.examples(split, limit=min(limit, size), seed=seed) if size else None
        if batch is None:
            return _no_block(start)
        right = greedy_right(model, task, batch).float()
        result[split] = (int(right.sum()), len(right))
        if split == "random":
            halves = (float(right[::2].mean()), float(right[1::2].mean()))
    (r, n), (k, m) = result["random"], result["block"]
    gap = r / n - k / m
    (r_low, r_high), (k_low, k_high) = wilson_interval(r, n), wilson_interval(k, m)
    low = gap - ((r / n - r_low) ** 2 + (k_high - k / m) ** 2) ** 0.5
    high = gap + ((r_high - r / n) ** 2 + (k / m - k_low) ** 2) ** 0.5
    return Evidence(
        test="block-gap",
        value=gap,
        interval=(low, high),
        control=halves[0] - halves[1],
        control_name="two halves of the random held-out pairs",
        threshold="not shown to exceed 0.05 for an algorithm; shown to, and >= 0.20, for local interpolation",
        passed=True if low <= 0.05 and high < 0.2 else (False if low > 0.05 and gap >= 0.2 else None),
        details={"random": r / n, "block": k / m, "n_block": m},
        source="Newcombe 1998, Statistics in Medicine 17:873, method 10",
        seconds=time.perf_counter() - start,
    )


def _no_block(start: float) -> Evidence:
    nan = float("nan")
    return Evidence(
        test="block-gap",
        value=nan,
        interval=(nan, nan),
        control=None,
        control_name="",
        threshold="needs a task with block > 0",
        passed=None,
        source="Newcombe 1998, Statistics in Medicine 17:873, method 10",
        seconds=time.perf_counter() - start,
    )
