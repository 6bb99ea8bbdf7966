"""Equivariance: do wrong answers, and neurons, follow the symmetries that the task has?"""

from __future__ import annotations

import time
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import bootstrap_interval
from circuits.mechanisms.accuracy import commutes
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.groups import group_index, operation_of
from circuits.mechanisms.readings import Readings, read, varies
from circuits.mechanisms.selection import regression
from circuits.tasks.base import Task

LEAST_UNSEEN = 200
"""Unseen pairs from which on they alone are looked at."""
ROWS = 2500
SWEEPS = 6
COMPONENTS = 24
HIDDEN_ROWS = 2500


def shift_from_answer(
    task: Task, operands: Int[Tensor, "rows 2"]
) -> tuple[Int[Tensor, "rows n_answers"], Bool[Tensor, " rows"], Bool[Tensor, " n_answers"]]:
    """How far each possible answer is from the right one in the task's group, rows and answers that are in the group.

    Modulo p the distance is c - answer modulo p (for products, of the logarithms; zero is in no group); on a line it
    is c - answer, shifted to be non-negative.
    """
    values, right = task.answer_values.to(operands.device), task.answer(operands)
    n = len(values)
    everything = torch.ones(n, dtype=torch.bool, device=operands.device)
    if not task.period:
        return values[None, :] - right[:, None] + n - 1, torch.ones_like(right, dtype=torch.bool), everything
    if operation_of(task) != "*":
        return (values[None, :] - right[:, None]) % task.period, torch.ones_like(right, dtype=torch.bool), everything
    pairs = torch.stack([values, torch.ones_like(values)], dim=1)
    renamed = group_index(task, pairs)
    assert renamed is not None  # products modulo a prime have one
    logarithm, _, in_group, modulus = renamed
    shift = (logarithm[None, :] - logarithm[right][:, None]) % modulus
    return shift, right > 0, in_group


def explained_by(
    values: Float[Tensor, "rows n_answers"], key: Int[Tensor, "rows n_answers"], counted: Bool[Tensor, "rows n_answers"]
) -> Float[Tensor, "half 2"]:
    """For each judged row, what a function of ``key`` and a constant per row leave of its variance, and that variance.

    The function is a table, fitted on every other row by alternating means and judged on the rows between;
    ``weighted_share`` turns the rows into the share that is explained. A key that the fit has not seen is taken for 0.
    """
    fit = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    fit[::2] = True
    n_keys = int(key.max()) + 1
    table = torch.zeros(n_keys, device=values.device)
    keys, mask, target = key[fit], counted[fit], values[fit]
    count = torch.zeros(n_keys, device=values.device).index_add_(0, keys[mask], torch.ones_like(target[mask]))
    for _ in range(SWEEPS):
        offset = _row_mean(target - table[keys], mask)
        left = (target - offset[:, None])[mask]
        table = torch.zeros_like(table).index_add_(0, keys[mask], left) / count.clamp_min(1)
    keys, mask, target = key[~fit], counted[~fit], values[~fit]
    centred = target - _row_mean(target, mask)[:, None]
    predicted = table[keys] - _row_mean(table[keys], mask)[:, None]
    left = ((centred - predicted).square() * mask).sum(1)
    return torch.stack([left, (centred.square() * mask).sum(1)], dim=1)


def _row_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(1) / mask.sum(1).clamp_min(1)


def weighted_share(left_and_total: Any) -> float:
    """1 - unexplained / total variance, of rows (unexplained, total); 0 where nothing varies, and at least -1."""
    left, total = left_and_total.sum(0)
    return max(-1.0, 1 - float(left) / float(total)) if float(total) > 0 else 0.0


def exchanged(
    task: Task, readings: Readings, rows: Int[Tensor, " k"], wrong: Bool[Tensor, "k n_answers"]
) -> tuple[float, float]:
    """Share of wrong answers' variance that is the same for (b, a) as for (a, b), and for another pair of equal sum.

    1 - |difference|^2 / (2 x variance), so that unrelated logits give 0. Pairs with a = b are left out.
    """
    n = task.n_operand_values
    where = torch.full((n * n,), -1, device=rows.device)
    index = readings.operands[:, 0] * n + readings.operands[:, 1]
    where[index] = torch.arange(len(index), device=rows.device)
    a, b = readings.operands[rows].T
    other = where[b * n + a]
    usable = (a != b) & (other >= 0)
    if not bool(usable.any()):
        return float("nan"), float("nan")
    mask = wrong[usable]
    first = _centred(readings.logits[rows[usable]], mask)
    # The next pair in the order of answers has the same answer, but for one pair of each answer.
    order = (readings.labels[rows[usable]] * (n * n) + index[rows[usable]] % 7919).argsort()
    sames = torch.empty_like(order)
    sames[order] = order.roll(1)
    equal = readings.labels[rows[usable]] == readings.labels[rows[usable]][sames]
    swapped = _centred(readings.logits[other[usable]], mask)
    return _alike(first, swapped), _alike(first[equal], first[sames][equal])


def _centred(values: Tensor, mask: Tensor) -> Tensor:
    return (values - _row_mean(values, mask)[:, None]) * mask


def _alike(first: Tensor, second: Tensor) -> float:
    variance = first.square().sum() + second.square().sum()
    return float(1 - (first - second).square().sum() / variance) if float(variance) > 0 else float("nan")


def neurons_move(task: Task, readings: Readings, *, seed: int, renamed: bool = False) -> float:
    """Share of the neurons' variance at (a + s, b) that one linear map predicts from those at (a, b), for unseen a.

    Neurons are weighted by importance and reduced to their leading components. The map is fitted on three quarters of
    the values of a and judged on the rest; half the range is the shift s (of the logarithm, where the task multiplies).
    With ``renamed``, numbers bear random other names, so that the shift is a permutation without structure.
    """
    generator = torch.Generator().manual_seed(seed)
    found = group_index(task, readings.operands)
    assert found is not None  # every one-token task has a renaming
    a, _, kept, modulus = found
    size = modulus if task.period else task.n_operand_values
    second = readings.operands[:, 1]
    names = torch.randperm(size, generator=generator).to(a.device) if renamed else torch.arange(size, device=a.device)
    place = torch.full((size, task.n_operand_values), -1, device=a.device)
    rows = kept.nonzero().flatten()
    place[names[a[rows]], second[rows]] = rows
    shift = size // 3
    target = torch.full_like(place, -1)
    target[: size - shift] = place[shift:]
    if task.period:
        target = place.roll(-shift, 0)
    usable = ((place >= 0) & (target >= 0)).nonzero()
    usable = usable[torch.randperm(len(usable), generator=generator)[:HIDDEN_ROWS].to(a.device)]
    before, after = place[usable[:, 0], usable[:, 1]], target[usable[:, 0], usable[:, 1]]
    spread = readings.neurons.std(0)
    weight = torch.where(varies(readings.neurons), readings.importance / spread, 0.0)
    states = (readings.neurons - readings.neurons.mean(0)) * weight
    top = weight.mul(spread).argsort(descending=True)[:512]
    moved = states[torch.cat([before, after])][:, top]
    axes = torch.linalg.eigh((moved.T @ moved).double())[1][:, -COMPONENTS:]
    projected = states[:, top] @ axes.to(states.dtype)
    hidden = torch.randperm(size, generator=generator)[: max(1, size // 4)].to(a.device)
    fit = ~torch.isin(usable[:, 0], hidden)
    if not bool(fit.any()) or bool(fit.all()):
        return float("nan")
    predicted = regression(projected[before], projected[after], fit)[~fit]
    judged = projected[after][~fit]
    total = (judged - judged.mean(0)).square().sum()
    return max(-1.0, float(1 - (judged - predicted).square().sum() / total.clamp_min(1e-30)))


def _judged_rows(readings: Readings, in_group: Tensor, *, seed: int) -> tuple[Tensor, bool]:
    """Rows outside the training split where there are enough of them, in a random order, and whether there are."""
    unseen = in_group & (readings.split > 0)
    enough = int(unseen.sum()) >= LEAST_UNSEEN
    rows = (unseen if enough else in_group).nonzero().flatten()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:ROWS].to(rows.device)
    return rows[order], enough


def equivariance(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Share of the variance of wrong answers' logits that depends only on how far an answer is from the right one.

    The symmetries: a + s moves the answer by s and (a + s, b - s) leaves it, on the line or modulo p; products modulo
    p scale likewise. Logits that follow all of them are a function of c - answer(a, b) alone, up to a constant per
    input. Any model that is right has a peak there, lookups and memorisers too (the share over all answers is 0.93 to
    1.00 for them), so that the right answer is left out, and only pairs outside the training split are judged where
    there are 200 of them. The function is fitted on one half of the pairs and judged on the other.

    The control gives operands and answers random other names, which keeps the answers and destroys the symmetry.
    ``invariant`` is the share that is a function of (answer, c): it follows a + s, b - s alone. ``exchange`` is the
    likeness of (a, b) and (b, a) in wrong answers, beside that of other pairs with the same answer. ``neurons`` is the
    share of the important neurons' variance at (a + s, b) that one linear map predicts from (a, b) for unseen values
    of a, beside the same with renamed numbers: a rotation for a Fourier code.

    High: one procedure everywhere, whatever the operands. Low: answers are found otherwise at different places.

    Formula: 1 - sum over inputs and wrong answers c of (l_c(a, b) - g(c - answer(a, b)))^2 / sum of (l_c - mean
        of l)^2, with l the logits centred for each input and g the mean of l at that distance over the other
        half of the pairs.

    Source: Chughtai et al. 2023 (arXiv 2302.03025), section 2, for the group view; equivariance of networks: Cohen &
    Welling 2016 (arXiv 1602.07576), section 2. Leaving out the right answer and the training pairs is ours.
    Fails when: votes fall off with the distance from the answer, as with matching ranges of the result, which then
    look equivariant; a logit that depends on a - b (pizza) or a carry costs an algorithm some. It describes.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    shift, in_group, answers = shift_from_answer(task, readings.operands)
    rows, unseen = _judged_rows(readings, in_group, seed=seed)
    n_answers = len(task.answer_values)
    wrong = answers[None, :] & (torch.arange(n_answers, device=rows.device)[None, :] != readings.labels[rows][:, None])
    logits = readings.logits[rows].float()
    parts = explained_by(logits, shift[rows], wrong)
    same_answer = readings.labels[rows][:, None] * n_answers + torch.arange(n_answers, device=rows.device)[None, :]
    generator = torch.Generator().manual_seed(seed)
    names = torch.randperm(n_answers, generator=generator).to(rows.device)
    renamed_shift = (names[None, :] - names[readings.labels[rows]][:, None]) % (2 * n_answers)
    if task.period:
        renamed_shift = renamed_shift % n_answers
    swapped, other_pair = exchanged(task, readings, rows, wrong) if commutes(task) else (float("nan"), float("nan"))
    pairs = parts.cpu().numpy()
    return Evidence(
        test="equivariance",
        value=weighted_share(pairs),
        interval=bootstrap_interval(pairs, weighted_share, seed=seed, resamples=1000),
        control=weighted_share(explained_by(logits, renamed_shift, wrong)),
        control_name="numbers renamed at random",
        threshold="none: it describes",
        passed=None,
        details={
            "unseen_pairs_only": unseen,
            "n_pairs": len(rows),
            "all_answers": weighted_share(explained_by(logits, shift[rows], answers[None, :].expand_as(wrong))),
            "invariant": weighted_share(explained_by(logits, same_answer, wrong)),
            "exchange": swapped,
            "other_pair_of_equal_answer": other_pair,
            "neurons": neurons_move(task, readings, seed=seed),
            "neurons_renamed": neurons_move(task, readings, seed=seed, renamed=True),
        },
        source="Chughtai et al. 2023, arXiv 2302.03025, section 2",
        seconds=time.perf_counter() - start,
    )
