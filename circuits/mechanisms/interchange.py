"""Interchange accuracy: does swapping one variable inside the operand's embedding change the answer as predicted?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import wilson_interval
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.functional_form import circle_length, most_frequencies, wave_frequencies
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
    component: Float[Tensor, "n d"],
    operand: int,
    predicted: Int[Tensor, " rows"],
) -> tuple[Bool[Tensor, " counted"], Bool[Tensor, " rows"]]:
    """Return which predictions hold once a component of an operand's embedding comes from the source.

    ``component`` is the part of the embedding of each value. Rows whose intact answer is wrong, whose prediction is
    undefined or does not differ from the intact answer are left out: the second tensor says which count.

    Source: interchange intervention accuracy: Geiger et al. 2021 (arXiv 2106.02997), definition 2.
    """
    device = device_of(model)
    legal = torch.isin(predicted, task.answer_values) & (predicted != task.answer(swap.base))
    counts = swap.right & legal.to(device)
    if not bool(counts.any()):
        return counts[counts], counts
    values = task.answer_values.to(device)
    base, source = swap.base.to(device)[counts], swap.source.to(device)[counts]
    delta = component[source[:, operand]] - component[base[:, operand]]
    tokens = task.encode(base.to(swap.base.device)).inputs.to(device)

    def put(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[:, operand] = activation[:, operand] + delta
        return activation

    answers = values[answer_logits(model, task, tokens, [("hook_embed", put)], cheap=True).argmax(-1)]
    return answers == predicted.to(device)[counts], counts


def swap_accuracy(
    model: Any, task: Task, swap: Swap, embedding: Tensor, basis: Tensor, operand: int, predicted: Tensor
) -> tuple[int, int]:
    """Return how many predictions of ``swap_holds`` hold for the part inside ``basis``, and how many rows count."""
    holds, _ = swap_holds(model, task, swap, embedding @ basis @ basis.T, operand, predicted)
    return int(holds.sum()), len(holds)


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
    answers = task.answer_values.to(tokens.device)[answer_logits(model, task, tokens, cheap=True).argmax(-1)]
    return Swap(base, source, answers == task.answer(base).to(tokens.device))


def variable_basis(variable: Variable, embedding: Tensor, n: int) -> Tensor | None:
    """Subspace for a one-operand variable: the means of its classes; None where every value is a class of its own."""
    operands = torch.arange(n)[:, None].expand(n, 2)
    values = variable.value(operands).to(embedding.device)
    if len(values.unique()) >= n:
        return None
    return orthonormal(class_means(embedding, values))


def digit_components(embedding: Float[Tensor, "n d"], base: int) -> tuple[Tensor, Tensor]:
    """The parts of each value's embedding that its low and its high digit explain, written to some base.

    Least squares of a sum of one vector for each digit: where the last high digit lacks some low ones, class means
    of one digit would hold some of the other.
    """
    x = torch.arange(len(embedding), device=embedding.device)
    low, high = _one_hot(x % base).to(embedding), _one_hot(x // base).to(embedding)
    low, high = low[:, 1:], high[:, 1:]  # against the digit 0, which the constant stands for
    design = torch.cat([torch.ones_like(low[:, :1]), low, high], dim=1)
    effects = torch.linalg.pinv(design) @ embedding
    return low @ effects[1 : 1 + low.shape[1]], high @ effects[1 + low.shape[1] :]


def digit_swapped(base: Int[Tensor, " rows"], source: Int[Tensor, " rows"], number: int, high: bool) -> Tensor:
    """Operands with the low or the high digit of others, written to the base ``number``."""
    return source // number * number + base % number if high else base // number * number + source % number


def written_to(embedding: Float[Tensor, "n d"]) -> int | None:
    """The base in which the embedding is most nearly a sum of one part for each of two digits; None below 4 values.

    Compared by explained variance beyond the share that as many classes explain of unstructured embeddings.
    """
    n = len(embedding)
    x = torch.arange(n, device=embedding.device)
    centred = embedding - embedding.mean(0)
    scores = {}
    for number in range(2, n // 2 + 1):
        classes = torch.cat([_one_hot(x % number), _one_hot(x // number)], dim=1)
        q = orthonormal(classes - classes.mean(0))
        share = float((q.T @ centred).square().sum() / centred.square().sum().clamp_min(1e-30))
        scores[number] = share - q.shape[1] / (n - 1)
    return max(scores, key=lambda number: scores[number]) if scores else None


def _one_hot(values: Int[Tensor, " n"]) -> Float[Tensor, "n k"]:
    return torch.nn.functional.one_hot(values).float()


@dataclass(frozen=True, eq=False)
class Candidate:
    """A part of the operand's embedding, and the answers that are right once it comes from the source."""

    name: str
    component: Float[Tensor, "n d"]
    predict: Callable[[Swap], Int[Tensor, " rows"]]

    @property
    def rank(self) -> int:
        """Dimensions that the part spans."""
        return int(orthonormal((self.component - self.component.mean(0)).T).shape[1])


def candidates(
    model: Any, task: Task, readings: Readings, embedding: Float[Tensor, "n d"], chosen: Swap, *, seed: int
) -> tuple[list[Candidate], list[int]]:
    """Return every candidate variable of the first operand, and the frequencies of the first of them.

    The number of frequencies is chosen on the given swaps, which must not be judged on; once for all tests.
    """
    key = f"candidates {seed}"
    if key in readings.remembered:
        known: tuple[list[Candidate], list[int]] = readings.remembered[key]
        return known
    n = task.n_operand_values
    own = [v for v in task.variables() if v.operand == 0]
    whole = next(v for v in own if len(v.value(torch.arange(n)[:, None].expand(n, 2)).unique()) == n)

    def full(swap: Swap) -> Tensor:
        return whole.swapped_answer(swap.base, swap.source)

    waves, used = _fewest_frequencies(model, task, readings, embedding, chosen, full(chosen), seed)
    line = orthonormal(slope(embedding))
    found = [Candidate(name, embedding @ q @ q.T, full) for name, q in (("frequencies", waves), ("line", line))]
    for variable in own:
        basis = variable_basis(variable, embedding, n)
        if basis is not None:
            component = embedding @ basis @ basis.T
            found.append(Candidate(variable.name.replace(" ", "_"), component, _swapped_variable(variable)))
    number = written_to(embedding)
    if task.period is None and number is not None:
        for high, component in enumerate(digit_components(embedding, number)):
            name = f"{('low', 'high')[high]}_digit_of_a"
            found.append(Candidate(name, component, _swapped_digit(task, number, bool(high))))
    readings.remembered[key] = found, used
    return found, used


def _swapped_variable(variable: Variable) -> Callable[[Swap], Tensor]:
    return lambda swap: variable.swapped_answer(swap.base, swap.source)


def _swapped_digit(task: Task, number: int, high: bool) -> Callable[[Swap], Tensor]:
    def predict(swap: Swap) -> Tensor:
        a = digit_swapped(swap.base[:, 0], swap.source[:, 0], number, high)
        legal = a < task.n_operand_values
        answers = task.answer(torch.stack([torch.where(legal, a, 0), swap.base[:, 1]], dim=1))
        return torch.where(legal, answers, task.undefined)

    return predict


def _fewest_frequencies(
    model: Any, task: Task, readings: Readings, embedding: Tensor, chosen: Swap, predicted: Tensor, seed: int
) -> tuple[Tensor, list[int]]:
    """The fewest key frequencies that carry the operand: their subspace, and which they are."""
    n = task.n_operand_values
    line = torch.stack([torch.arange(n), torch.ones(n, dtype=torch.long)], dim=1).to(embedding.device)
    renamed = group_index(task, line, circle=circle_length(model, task, readings, seed=seed))
    assert renamed is not None
    index, _, kept, modulus = renamed
    first = wave_frequencies(model, task, readings, seed=seed)
    centred = embedding - embedding.mean(0)
    power = {
        k: float(frequency_directions(centred, index, kept, k, modulus).square().sum())
        for k in range(1, modulus // 2 + 1)
    }
    order = first + [k for k in sorted(power, key=lambda k: -power[k]) if k not in first]
    rank = orthonormal(centred.T).shape[1]
    most = max(1, min(most_frequencies(model, task, readings, modulus, seed=seed), rank // 2))
    basis = embedding.new_zeros(embedding.shape[1], 0)
    size = max(1, min(len(first), most))
    while size <= most:
        columns = [frequency_directions(centred, index, kept, k, modulus) for k in order[:size]]
        basis = orthonormal(torch.cat(columns, dim=1))
        hold, counted = swap_accuracy(model, task, chosen, embedding, basis, 0, predicted)
        if not counted or hold / counted >= 0.95:
            break
        size += 1
    return basis, order[: min(size, most)]


def interchange(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Best interchange accuracy over the task's candidate variables of the first operand.

    Candidates: the operand's key frequencies (prediction: the whole operand is swapped), its slope direction (the
    same prediction), every declared variable with fewer classes than values, through the subspace of its class means
    (units digit, tens digit; prediction: only that digit is swapped), and, where nothing wraps around, the two digits
    in the base that fits the embedding best. Accuracies are shares of the accuracy on intact inputs, which no swap can
    exceed but by luck, and at most 1. ``control`` swaps a random subspace of the embedding of the same rank as the best
    candidate's and asks for the same prediction; ``NAME_complement`` swaps all of the embedding but the candidate's
    part, which must not carry the operand.

    Source: Geiger et al. 2021 (arXiv 2106.02997); subspaces by class means as in linear concept erasure.
    Fails when: the embedding has so low a rank that any subspace of that size is all of it (``control`` is then high);
    or the variable is computed later than the embedding.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    embedding = operand_embedding(model, task)
    swaps = draw_swaps(model, task, n=PAIRS, seed=seed)
    chosen, other = (Swap(swaps.base[i::2], swaps.source[i::2], swaps.right[i::2]) for i in range(2))
    found, used = candidates(model, task, readings, embedding, chosen, seed=seed)
    accuracy = float(readings.right.float().mean())
    results: dict[str, tuple[int, int]] = {}
    details: dict[str, Any] = {}
    for candidate in found:
        predicted = candidate.predict(other)
        holds, _ = swap_holds(model, task, other, candidate.component, 0, predicted)
        results[candidate.name] = int(holds.sum()), len(holds)
        details[candidate.name] = _relative(*results[candidate.name], accuracy)
    best = max(found, key=lambda candidate: details[candidate.name])
    waves = found[0]
    for name, candidate in (("frequencies", waves), ("best", best)):
        holds, _ = swap_holds(model, task, other, embedding - candidate.component, 0, candidate.predict(other))
        details[f"{name}_complement"] = float(holds.float().mean()) if len(holds) else 0.0
    control = _random_control(model, task, other, embedding, best.rank, best.predict(other), seed)
    details |= {
        "best": best.name,
        "accuracy": accuracy,
        "used_frequencies": sorted(used),
        "digit_base": written_to(embedding),
        "subspace_rank": best.rank,
        "embedding_rank": int(orthonormal((embedding - embedding.mean(0)).T).shape[1]),
        "frequencies_rank": waves.rank,
        "frequencies_control": _random_control(
            model, task, other, embedding, waves.rank, waves.predict(other), seed + 1
        ),
    }
    low, high = (min(1.0, end / max(accuracy, 1e-12)) for end in wilson_interval(*results[best.name]))
    return Evidence(
        test="interchange",
        value=details[best.name],
        interval=(low, high),
        control=control,
        control_name="random subspace of equal rank",
        threshold="best candidate >= 0.95, the rest of the embedding <= 0.10 and random subspace below",
        passed=details[best.name] >= 0.95 and details["best_complement"] <= 0.1,
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
    hold, counted = swap_accuracy(model, task, swap, embedding, random_basis(embedding, rank, seed), 0, predicted)
    return hold / counted if counted else 0.0


def random_basis(embedding: Float[Tensor, "n d"], rank: int, seed: int) -> Float[Tensor, "d r"]:
    """Orthonormal basis of a random subspace of some rank inside the span of the embedding."""
    generator = torch.Generator().manual_seed(seed)
    span = orthonormal((embedding - embedding.mean(0)).T)
    mix = torch.randn(span.shape[1], min(rank, span.shape[1]), generator=generator).to(span.device)
    return orthonormal(span @ mix)
