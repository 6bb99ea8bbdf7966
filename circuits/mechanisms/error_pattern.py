"""Error pattern: are errors whole bands off, off by one or two, near range borders, or where digits carry?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import bootstrap_interval, wilson_interval
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.groups import operation_of
from circuits.mechanisms.readings import MAX_ROWS, Readings, answer_logits, read
from circuits.mechanisms.rectangles import edge_grid, rectangle_fits
from circuits.tasks.arithmetic.columns import carries, cascade_length
from circuits.tasks.base import Task

FEWEST = 30
"""With fewer errors of its own than this, the model is ablated until it makes some."""
DRAWS = 6
LEFT = 0.8
"""Accuracy that the ablated models keep, on up to ``MOST_ROWS`` pairs."""
MOST_ROWS = 1024
SHUFFLES = 20
DECADE = 10


@dataclass(frozen=True, eq=False)
class Answers:
    """True and given answers (as numbers) to some operand pairs; a pair can stand there several times."""

    operands: Int[Tensor, "rows 2"]
    true: Int[Tensor, " rows"]
    given: Int[Tensor, " rows"]
    period: int | None

    @property
    def wrong(self) -> Bool[Tensor, " rows"]:
        """Which answers are errors."""
        return self.true != self.given

    def off(self, given: Int[Tensor, " rows"] | None = None) -> Int[Tensor, " rows"]:
        """By how much answers are too large; on a circle, the shorter way round."""
        difference = (self.given if given is None else given) - self.true
        if self.period is None:
            return difference
        return (difference + self.period // 2) % self.period - self.period // 2

    def errors(self) -> Answers:
        """The wrong answers alone."""
        return Answers(self.operands[self.wrong], self.true[self.wrong], self.given[self.wrong], self.period)


def border_distance(operands: Int[Tensor, "rows 2"], width: int, offset: int) -> Float[Tensor, " rows"]:
    """Steps from either operand, whichever is nearer, to the nearest border of ranges of ``width`` from ``offset`` on.

    0 for the first and the last number of a range.
    """
    place = (operands - offset) % width
    return torch.minimum(place, width - 1 - place).amin(1).float()


def complexity(operands: Int[Tensor, "rows 2"]) -> Int[Tensor, " rows"]:
    """0 without a carry, 1 with carries, 1 + k where a carry runs on through k columns that sum to nine.

    Source: the classes S0, S1, S2, ... of Quirke and Barez 2024 (arXiv 2402.02619).
    """
    n_digits = len(str(max(int(operands.max()), 1)))
    any_carry = carries(operands, n_digits).amax(1) > 0
    return torch.where(any_carry, 1 + cascade_length(operands, n_digits), 0)


def share_with_shuffled(
    answers: Answers, holds: Any, generator: torch.Generator
) -> tuple[float, tuple[float, float], float]:
    """Share of errors whose size satisfies a predicate, its interval, and the share when answers are exchanged.

    Exchanging the wrong answers between errors keeps which numbers are said and breaks what they are said to.
    """
    errors = answers.errors()
    count, n = int(holds(errors.off()).sum()), len(errors.true)
    hits = trials = 0
    for _ in range(SHUFFLES):
        given = errors.given[torch.randperm(n, generator=generator).to(errors.given.device)]
        still = given != errors.true
        hits += int((holds(errors.off(given)) & still).sum())
        trials += int(still.sum())
    return count / max(n, 1), wilson_interval(count, n), hits / max(trials, 1)


def error_pattern(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Share of errors that are a multiple of ten, with what else is typical of errors by range or by column.

    Errors are the model's own, or, where it makes fewer than 30, those of ablated models: a random part of the neurons
    is held at its mean, as many as leave 80 % of the answers right, in six draws (``errors_of`` says which). Each share
    stands beside its control: ``multiples_of_ten``, ``multiples_of_band`` and ``off_by_one_or_two`` beside the same
    errors with their answers exchanged; ``border_distance``, the mean number of steps from an operand to the nearest
    range border, beside all pairs. Borders lie on the grid of the model's own rectangles (test ``rectangles``) where a
    third of its interior edges or more do beyond chance, else on tens. ``carry_excess`` is the error rate with a carry
    less that without, among pairs with the same tens digits, so that size has no part in it; its control exchanges
    the outcomes of such pairs. ``by_complexity`` is the error rate without a carry, with one, and with cascades.

    Of errors that a model makes by itself, whole bands off and near the borders are those of matched ranges (one grid
    of ranges: all of them), one or two off those of a magnitude code, and those that rise with carries are of columns.

    Formula: mean over errors of [(said - answer) mod 10 = 0]; the control takes said from another error.

    Source: carry classes: Quirke and Barez 2024 (arXiv 2402.02619); errors of range matching and the controls are ours.
    Fails when: errors come from ablation. They tell which part was hit, not how the intact model would err: four grids
    of ranges are right everywhere, and without a quarter of their neurons off by one or two, since the table of units
    digits is hit first. ``carry_excess`` alone holds up: 0.5 for ablated columns and within 0.06 of zero for all else.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    answers, whose = _answers(model, task, readings, generator)
    n_errors = int(answers.wrong.sum())
    details: dict[str, Any] = {"errors_of": whose, "n_errors": n_errors, "error_rate": n_errors / len(answers.true)}
    if n_errors < FEWEST:
        return _evidence(float("nan"), (float("nan"), float("nan")), None, details, start)
    width, offset, from_model = _band(readings, task.n_operand_values)
    shares = {
        "multiples_of_ten": lambda off: off % DECADE == 0,
        "multiples_of_band": lambda off: off % width == 0,
        "off_by_one_or_two": lambda off: off.abs() <= 2,
    }
    for name, holds in shares.items():
        share, interval, control = share_with_shuffled(answers, holds, generator)
        details |= {name: share, f"{name}_interval": list(interval), f"{name}_control": control}
    distance = border_distance(answers.operands, width, offset)
    at_errors = distance[answers.wrong].cpu().numpy()
    details |= {
        "band_width": width,
        "band_offset": offset,
        "band_is_the_models": from_model,
        "border_distance": float(at_errors.mean()),
        "border_distance_interval": list(bootstrap_interval(at_errors, seed=seed)),
        "border_distance_control": float(distance.mean()),
    }
    if operation_of(task) == "+":
        details |= _by_carry(answers, generator, seed)
    value, control = details["multiples_of_ten"], details["multiples_of_ten_control"]
    low, high = details["multiples_of_ten_interval"]
    return _evidence(value, (low, high), control, details, start)


def _evidence(
    value: float, interval: tuple[float, float], control: float | None, details: dict[str, Any], start: float
) -> Evidence:
    return Evidence(
        test="error-pattern",
        value=value,
        interval=interval,
        control=control,
        control_name="wrong answers exchanged between errors",
        threshold=f"none: it describes (needs {FEWEST} errors)",
        passed=None,
        details=details,
        source="Quirke and Barez 2024, arXiv 2402.02619; controls are ours",
        seconds=time.perf_counter() - start,
    )


def _band(readings: Readings, n: int) -> tuple[int, int, bool]:
    """Width and offset of the grid of the model's rectangles, and whether there is one; else tens."""
    if n * n <= MAX_ROWS:
        grid = edge_grid(rectangle_fits(readings, n).found, n)
        if grid["edge_p"] <= 0.01:
            return int(grid["edge_width"]), int(grid["edge_offset"]), True
    return DECADE, 0, False


def _answers(model: Any, task: Task, readings: Readings, generator: torch.Generator) -> tuple[Answers, str]:
    """The model's answers to all pairs, or those of ablated models to some; and whose they are."""
    values = task.answer_values.to(readings.labels.device)
    true, given = values[readings.labels], values[readings.logits.argmax(-1)]
    if int((true != given).sum()) >= FEWEST:
        return Answers(readings.operands, true, given, task.period), "the model"
    rows = torch.randperm(len(true), generator=generator).to(true.device)[:MOST_ROWS]
    parts, shares = [], []
    n_neurons = readings.neurons.shape[1]
    for _ in range(DRAWS):
        place = torch.randperm(n_neurons, generator=generator).to(true.device)
        low, high = 0, n_neurons
        while low < high:
            most = (low + high + 1) // 2
            answers = _without(model, task, readings, rows[: MOST_ROWS // 2], place < most)
            right = answers == readings.labels[rows[: MOST_ROWS // 2]]
            low, high = (most, high) if float(right.float().mean()) >= LEFT else (low, most - 1)
        # one neuron more than it can spare, where one neuron makes the difference
        ablated = place < min(low + 1, n_neurons)
        parts.append(values[_without(model, task, readings, rows, ablated)])
        shares.append(float(ablated.float().mean()))
    pooled = Answers(readings.operands[rows].repeat(DRAWS, 1), true[rows].repeat(DRAWS), torch.cat(parts), task.period)
    mean = sum(shares) / DRAWS
    return pooled, f"the model with a random {mean:.0%} of its neurons held at their mean, {DRAWS} draws"


def _without(
    model: Any, task: Task, readings: Readings, rows: Int[Tensor, " k"], ablated: Bool[Tensor, " n_neurons"]
) -> Int[Tensor, " k"]:
    """Answers (as indices) with some neurons at their mean at the answer position."""
    layers = torch.tensor(readings.layers, device=rows.device)
    mean = readings.neurons.mean(0)
    hooks = []
    for layer in sorted(set(readings.layers)):
        mine = layers == layer

        def put(activation: Tensor, hook: Any, out: Tensor = ablated[mine], value: Tensor = mean[mine]) -> Tensor:
            activation = activation.clone()
            activation[:, -1] = torch.where(out, value.to(activation.dtype), activation[:, -1])
            return activation

        hooks.append((f"blocks.{layer}.mlp.hook_post", put))
    return answer_logits(model, task, readings.tokens[rows], hooks).argmax(-1)


def _by_carry(answers: Answers, generator: torch.Generator, seed: int) -> dict[str, Any]:
    """Error rates by carries, and their excess among pairs with the same tens."""
    kind, wrong = complexity(answers.operands).cpu().numpy(), answers.wrong.cpu().numpy()
    cell = (answers.operands // DECADE).cpu().numpy()
    _, stratum = np.unique(cell, axis=0, return_inverse=True)
    real = _strata(stratum, kind > 0, wrong)
    details: dict[str, Any] = {
        "by_complexity": {f"S{k}": float(wrong[kind == k].mean()) for k in sorted(set(kind.tolist()))}
    }
    if not len(real):
        return details | {"carry_excess": None}
    null = _strata(stratum, kind > 0, _within(wrong, stratum, generator))
    return details | {
        "carry_excess": _weighted(real),
        "carry_excess_interval": list(bootstrap_interval(real, _weighted, seed=seed)),
        "carry_excess_control": _weighted(null),
    }


def _within(values: np.ndarray, stratum: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """The values exchanged at random within each stratum."""
    noise = torch.rand(len(values), generator=generator).numpy()
    out = np.empty_like(values)
    out[np.argsort(stratum, kind="stable")] = values[np.lexsort((noise, stratum))]
    return out


def _strata(stratum: np.ndarray, carry: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """For each stratum with both kinds of pairs: difference of error rates, and its weight."""
    rows = []
    for s in range(int(stratum.max()) + 1):
        mine = stratum == s
        with_carry, without = wrong[mine & carry], wrong[mine & ~carry]
        if len(with_carry) and len(without):
            weight = len(with_carry) * len(without) / (len(with_carry) + len(without))
            rows.append((with_carry.mean() - without.mean(), weight))
    return np.array(rows)


def _weighted(rows: np.ndarray) -> float:
    return float((rows[:, 0] * rows[:, 1]).sum() / max(rows[:, 1].sum(), 1e-12))
