"""Causal scrubbing: are the neurons functions of an algorithm's variables, and of nothing else that answers need?"""

from __future__ import annotations

import time
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import wilson_interval
from circuits.mechanisms.digit_neurons import written
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.groups import operation_of
from circuits.mechanisms.interchange import digit_bases, operand_embedding
from circuits.mechanisms.least_squares import class_means
from circuits.mechanisms.operand_parts import two_way
from circuits.mechanisms.readings import Readings, decisive_layers, read
from circuits.mechanisms.rectangles import accuracy_with, judged_rows
from circuits.mechanisms.thresholds import RULE
from circuits.tasks.base import Task


def resampled(
    neurons: Float[Tensor, "rows n"],
    classes: Int[Tensor, " rows"],
    rows: Int[Tensor, " some"],
    generator: torch.Generator,
) -> Float[Tensor, "some n"]:
    """Return on some rows each neuron's value on another row of the same class, drawn for each neuron by itself."""
    order = classes.argsort(stable=True)
    counts = torch.bincount(classes)
    starts = counts.cumsum(0) - counts
    own = classes[rows]
    draws = torch.rand(len(rows), neurons.shape[1], generator=generator).to(neurons.device)
    chosen = order[(starts[own][:, None] + (draws * counts[own][:, None]).long()).clamp(max=len(classes) - 1)]
    return neurons.gather(0, chosen)


def causal_scrubbing(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Share of answers that survive once every neuron is taken from other inputs that an algorithm cannot tell apart.

    On a number line a neuron knows the result (before it wraps around, where it does) and nothing else of the operands.
    Each neuron of the layers that matter, by itself, is given its value on a random other input with the same result.
    A network whose neurons are functions of the result does not notice. A table of pairs does, however smooth its
    neurons are: they know which pair it is, their votes cancel only together, and from different pairs they do not.

    ``columns`` is the same for columns of digits, in the base (of those that ``interchange`` tries) where most
    survives: a neuron is what the low digits say plus what the high digits and the carry say, or a function of the
    result; what is left of it is taken from a random other input. ``control`` renames the operands at random first.

    Formula: mean over (a, b) of [the answer is right with every h_i(a, b) in place of h_i(a', b'), (a', b') drawn for
        each neuron i among the inputs with a' + b' = a + b], as a share of the intact accuracy.

    Source: Chan et al. 2022, Causal scrubbing (Alignment Forum): resampling what the hypothesis says to be irrelevant.
    Fails when: a neuron works on both columns at once, as those of a trained network may: it does not survive whole,
    so that columns need half of their answers to survive. A list with a neuron for each pair survives in part (where
    few pairs have one result, their neurons hit by chance): ``pair-lookup`` is about those.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    layers = torch.tensor(readings.layers, device=readings.labels.device)
    wanted = torch.isin(layers, torch.tensor(decisive_layers(model, task, readings), device=layers.device))
    columns = (wanted & (readings.importance > 0)).nonzero().flatten()
    rows = judged_rows(readings, seed=seed)
    neurons = readings.neurons[:, columns]
    intact = float(readings.right[rows].float().mean())
    operands = readings.operands.cpu()
    renamed = torch.randperm(task.n_operand_values, generator=torch.Generator().manual_seed(seed))

    def survives(values: Float[Tensor, "some k"]) -> Bool[Tensor, " some"]:
        return accuracy_with(model, task, readings, columns, values, rows)

    def by_line(names: Int[Tensor, " n"]) -> Bool[Tensor, " some"]:
        generator = torch.Generator().manual_seed(seed + 1)
        return survives(resampled(neurons, _results(task, names[operands]).to(rows.device), rows, generator))

    held, control = by_line(torch.arange(task.n_operand_values)), by_line(renamed)
    details: dict[str, Any] = {"accuracy": intact, "line": _relative(held, intact)}
    for base in digit_bases(task, readings, operand_embedding(model, task)):
        share = _relative(survives(_by_columns(task, readings, neurons, base, rows, seed)), intact)
        if share > details.get("columns", -1.0):
            details |= {"columns": share, "digit_base": base}
    low, high = wilson_interval(int(held.sum()), len(held))
    return Evidence(
        test="causal-scrubbing",
        value=details["line"],
        interval=(min(1.0, low / max(intact, 1e-12)), min(1.0, high / max(intact, 1e-12))),
        control=_relative(control, intact),
        control_name="operands renamed at random",
        threshold=f"on a line >= {RULE.scrubbed_line:.2f}; for columns either >= {RULE.scrubbed_columns:.2f}",
        passed=details["line"] >= RULE.scrubbed_line,
        details=details,
        source="Chan et al. 2022, Causal scrubbing, Alignment Forum",
        seconds=time.perf_counter() - start,
    )


def _results(task: Task, operands: Int[Tensor, "rows 2"]) -> Int[Tensor, " rows"]:
    """The result before it wraps around, as a class from 0 on."""
    a, b = operands.T
    result = {"+": a + b, "-": a - b, "*": a * b}[operation_of(task) or "+"]
    return result.unique(return_inverse=True)[1]


def _by_columns(
    task: Task, readings: Readings, neurons: Float[Tensor, "rows k"], base: int, rows: Tensor, seed: int
) -> Float[Tensor, "some k"]:
    """Each neuron as what each column says of it, or the result, and the rest of another input."""
    device = neurons.device
    operands = readings.operands.cpu()
    low, high = written(torch.arange(task.n_operand_values), base).classes(operands)
    a, b = (operands % base).T
    carry = (a < b) if operation_of(task) == "-" else (a + b >= base)
    first, second = (x.unique(return_inverse=True)[1].to(device) for x in (low, 2 * high + carry))
    parts = two_way(neurons, first, second)
    said = neurons.mean(0) + parts[0][first] + parts[1][second]
    result = _results(task, operands).to(device)
    by_result = class_means(neurons, result, int(result.max()) + 1)[result]
    rest = neurons - said
    of_result = (neurons - by_result).square().sum(0) < rest.square().sum(0)
    generator = torch.Generator().manual_seed(seed + 2)
    everything = torch.zeros_like(result)
    added = said[rows] + resampled(rest, everything, rows, generator)
    return torch.where(of_result, resampled(neurons, result, rows, generator), added)


def _relative(held: Bool[Tensor, " some"], accuracy: float) -> float:
    return min(1.0, float(held.float().mean()) / max(accuracy, 1e-12)) if len(held) else 0.0
