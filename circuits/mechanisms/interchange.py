"""Interchange accuracy: does swapping one variable inside the operand's embedding change the answer as predicted?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import wilson_interval
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.functional_form import wave_frequencies
from circuits.mechanisms.readings import Readings, activations, angle, answer_logits, device_of, group_index, read
from circuits.tasks.base import Task, Variable

PAIRS = 2000


@dataclass(frozen=True, eq=False)
class Swap:
    """Operand pairs to run (``base``) and to take the variable from (``source``), and intact correctness on base."""

    base: Int[Tensor, "rows 2"]
    source: Int[Tensor, "rows 2"]
    right: Bool[Tensor, " rows"]


def orthonormal(columns: Float[Tensor, "d k"]) -> Float[Tensor, "d r"]:
    """Orthonormal basis of the span of some columns."""
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, s > 1e-5 * s.max().clamp_min(1e-30)]


def class_means(embedding: Float[Tensor, "n d"], values: Int[Tensor, " n"]) -> Float[Tensor, "d k"]:
    """Centred mean embedding of each class of operand values, one column a class."""
    means = [embedding[values == v].mean(0) for v in values.unique().tolist()]
    return (torch.stack(means) - embedding.mean(0)).T


def slope(embedding: Float[Tensor, "n d"]) -> Float[Tensor, "d 1"]:
    """Least-squares direction along which the embedding moves as the operand grows by one."""
    x = torch.arange(len(embedding), device=embedding.device, dtype=embedding.dtype)
    x = x - x.mean()
    return ((embedding - embedding.mean(0)).T @ x / x.square().sum())[:, None]


def frequency_directions(
    embedding: Float[Tensor, "n d"], index: Int[Tensor, " n"], kept: Bool[Tensor, " n"], frequency: int, modulus: int
) -> Float[Tensor, "d 2"]:
    """Directions of the embedding that carry cos and sin of one frequency of the operand."""
    w = angle(index[kept], frequency, modulus)
    return torch.stack([embedding[kept].T @ w.cos(), embedding[kept].T @ w.sin()], dim=1)


def swap_holds(
    model: Any,
    task: Task,
    swap: Swap,
    embedding: Float[Tensor, "n d"],
    basis: Float[Tensor, "d r"],
    operand: int,
    predicted: Int[Tensor, " rows"],
) -> tuple[Bool[Tensor, " counted"], Bool[Tensor, " rows"]]:
    """Return which predictions hold once the part of an operand's embedding inside ``basis`` comes from the source.

    Rows whose intact answer is wrong, whose prediction is undefined or does not differ from the intact answer are
    left out: the second tensor says which count.

    Source: interchange intervention accuracy: Geiger et al. 2021 (arXiv 2106.02997), definition 2.
    """
    device = device_of(model)
    legal = torch.isin(predicted, task.answer_values) & (predicted != task.answer(swap.base))
    counts = swap.right & legal.to(device)
    if not bool(counts.any()):
        return counts[counts], counts
    values = task.answer_values.to(device)
    base, source = swap.base.to(device)[counts], swap.source.to(device)[counts]
    delta = (embedding[source[:, operand]] - embedding[base[:, operand]]) @ basis @ basis.T
    tokens = task.encode(base.to(swap.base.device)).inputs.to(device)

    def put(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[:, operand] = activation[:, operand] + delta
        return activation

    answers = values[answer_logits(model, task, tokens, [("hook_embed", put)]).argmax(-1)]
    return answers == predicted.to(device)[counts], counts


def swap_accuracy(
    model: Any, task: Task, swap: Swap, embedding: Tensor, basis: Tensor, operand: int, predicted: Tensor
) -> tuple[int, int]:
    """Return how many predictions of ``swap_holds`` hold, and how many rows count."""
    holds, _ = swap_holds(model, task, swap, embedding, basis, operand, predicted)
    return int(holds.sum()), len(holds)


def by_quadrant(
    model: Any, task: Task, swap: Swap, embedding: Tensor, basis: Tensor, predicted: Tensor
) -> list[tuple[int, int]]:
    """Return what ``swap_accuracy`` gives for each quadrant of the operand square, with the source in it as well."""
    holds, counts = swap_holds(model, task, swap, embedding, basis, 0, predicted)
    high = torch.cat([swap.base, swap.source[:, :1]], dim=1).to(counts.device)[counts] >= task.n_operand_values / 2
    same = high[:, 0] == high[:, 2]
    quadrant = 2 * high[:, 0].long() + high[:, 1].long()
    return [(int(holds[same & (quadrant == q)].sum()), int((same & (quadrant == q)).sum())) for q in range(4)]


def operand_embedding(model: Any, task: Task) -> Float[Tensor, "n d"]:
    """What ``hook_embed`` holds for each operand value."""
    n = task.n_operand_values
    values = torch.arange(n)
    tokens = task.encode(torch.stack([values, values], dim=1)).inputs.to(device_of(model))
    return activations(model, tokens, ["hook_embed"])["hook_embed"][:, 0]


def draw_swaps(model: Any, task: Task, *, n: int, seed: int) -> Swap:
    """Random base and source operand pairs."""
    generator = torch.Generator().manual_seed(seed)
    size = task.n_operand_values
    base = torch.randint(size, (n, 2), generator=generator)
    source = torch.randint(size, (n, 2), generator=generator)
    tokens = task.encode(base).inputs.to(device_of(model))
    answers = task.answer_values.to(tokens.device)[answer_logits(model, task, tokens).argmax(-1)]
    return Swap(base, source, answers == task.answer(base).to(tokens.device))


def variable_basis(variable: Variable, embedding: Tensor, n: int) -> Tensor | None:
    """Subspace for a one-operand variable: the means of its classes; None where every value is a class of its own."""
    operands = torch.arange(n)[:, None].expand(n, 2)
    values = variable.value(operands).to(embedding.device)
    if len(values.unique()) >= n:
        return None
    return orthonormal(class_means(embedding, values))


def _fourier(
    model: Any, task: Task, readings: Readings, embedding: Tensor, whole: Variable, halves: tuple[Swap, Swap], seed: int
) -> tuple[tuple[int, int], Tensor, list[int]]:
    """Swap of the fewest key frequencies that carry the operand, chosen on one half and judged on the other."""
    n = task.n_operand_values
    line = torch.stack([torch.arange(n), torch.zeros(n, dtype=torch.long)], dim=1).to(embedding.device)
    line[:, 1] += 1
    renamed = group_index(task, line)
    assert renamed is not None
    index, _, kept, modulus = renamed
    first = wave_frequencies(model, task, readings, seed=seed)
    power = {
        k: float(frequency_directions(embedding - embedding.mean(0), index, kept, k, modulus).square().sum())
        for k in range(1, modulus // 2 + 1)
    }
    order = first + [k for k in sorted(power, key=lambda k: -power[k]) if k not in first]
    rank = orthonormal((embedding - embedding.mean(0)).T).shape[1]
    most = max(1, min(modulus // 6, rank // 3))
    chosen, other = halves
    predicted = whole.swapped_answer(chosen.base, chosen.source)
    for size in range(max(1, min(len(first), most)), most + 1):
        columns = [frequency_directions(embedding, index, kept, k, modulus) for k in order[:size]]
        basis = orthonormal(torch.cat(columns, dim=1))
        hold, counted = swap_accuracy(model, task, chosen, embedding, basis, 0, predicted)
        if counted and hold / counted >= 0.95:
            break
    judged = swap_accuracy(model, task, other, embedding, basis, 0, whole.swapped_answer(other.base, other.source))
    return judged, basis, order[:size]


def interchange(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Best interchange accuracy over the task's candidate variables of the first operand.

    Candidates: the operand's key frequencies (prediction: the whole operand is swapped), its slope direction (the
    same prediction), and every declared variable with fewer classes than values (units digit, tens digit:
    prediction: only that digit is swapped), each through the subspace of its class means. Accuracies are shares of the
    accuracy on intact inputs, which no swap can exceed but by luck, and at most 1. ``control`` swaps a random
    subspace of the embedding of the same rank as the best candidate's and asks for the same prediction.

    Source: Geiger et al. 2021 (arXiv 2106.02997); subspaces by class means as in linear concept erasure.
    Fails when: the embedding has so low a rank that any subspace of that size is all of it (``control`` is then high);
    or the variable is computed later than the embedding.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    embedding = operand_embedding(model, task)
    n = task.n_operand_values
    swaps = draw_swaps(model, task, n=PAIRS, seed=seed)
    halves = tuple(Swap(swaps.base[i::2], swaps.source[i::2], swaps.right[i::2]) for i in range(2))
    other = halves[1]
    own = [v for v in task.variables() if v.operand == 0]
    whole = next(v for v in own if len(v.value(torch.arange(n)[:, None].expand(n, 2)).unique()) == n)
    results: dict[str, tuple[int, int]] = {}
    bases: dict[str, Tensor] = {}
    predictions: dict[str, Tensor] = {}
    full = whole.swapped_answer(other.base, other.source)
    found, waves, used = _fourier(model, task, readings, embedding, whole, (halves[0], halves[1]), seed)
    results["frequencies"], bases["frequencies"] = found, waves
    predictions["frequencies"] = predictions["line"] = full
    bases["line"] = orthonormal(slope(embedding))
    results["line"] = swap_accuracy(model, task, other, embedding, bases["line"], 0, full)
    for variable in own:
        basis = variable_basis(variable, embedding, n)
        if basis is not None:
            bases[variable.name] = basis
            predictions[variable.name] = variable.swapped_answer(other.base, other.source)
            results[variable.name] = swap_accuracy(model, task, other, embedding, basis, 0, predictions[variable.name])
    accuracy = float(readings.right.float().mean())
    shares = {k: _relative(hold, counted, accuracy) for k, (hold, counted) in results.items()}
    best = max(shares, key=lambda k: shares[k])
    control = _random_control(model, task, other, embedding, bases[best].shape[1], predictions[best], seed)
    details: dict[str, Any] = {k.replace(" ", "_"): v for k, v in shares.items()}
    quarters = by_quadrant(model, task, other, embedding, waves, full)
    details |= {
        "best": best,
        "accuracy": accuracy,
        "used_frequencies": sorted(used),
        "subspace_rank": int(bases[best].shape[1]),
        "embedding_rank": int(orthonormal((embedding - embedding.mean(0)).T).shape[1]),
        "frequencies_control": _random_control(model, task, other, embedding, waves.shape[1], full, seed + 1),
        "frequencies_by_quadrant": [_relative(hold, counted, accuracy) for hold, counted in quarters],
    }
    hold, counted = results[best]
    low, high = (min(1.0, end / max(accuracy, 1e-12)) for end in wilson_interval(hold, counted))
    return Evidence(
        test="interchange",
        value=shares[best],
        interval=(low, high),
        control=control,
        control_name="random subspace of equal rank",
        threshold="best candidate >= 0.95 and random subspace <= 0.10",
        passed=shares[best] >= 0.95 and control <= 0.1,
        details=details,
        source="Geiger et al. 2021, arXiv 2106.02997",
        seconds=time.perf_counter() - start,
    )


def _relative(hold: int, counted: int, accuracy: float) -> float:
    """The share that hold, as a share of the intact accuracy."""
    return min(1.0, hold / counted / max(accuracy, 1e-12)) if counted else 0.0


def _random_control(
    model: Any, task: Task, swap: Swap, embedding: Tensor, rank: int, predicted: Tensor, seed: int
) -> float:
    """The same prediction through a random subspace of equal rank inside the span of the embedding."""
    generator = torch.Generator().manual_seed(seed)
    span = orthonormal((embedding - embedding.mean(0)).T)
    mix = torch.randn(span.shape[1], min(rank, span.shape[1]), generator=generator).to(span.device)
    hold, counted = swap_accuracy(model, task, swap, embedding, orthonormal(span @ mix), 0, predicted)
    return hold / counted if counted else 0.0
