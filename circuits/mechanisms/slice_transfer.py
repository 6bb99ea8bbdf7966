"""Slice transfer: do the neurons that suffice for one slice of inputs suffice for the others?"""

from __future__ import annotations

import time
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.readings import Readings, answer_logits, read
from circuits.tasks.base import Task

TARGET = 0.97
MOST_ROWS = 600


def slices(readings: Readings, task: Task) -> dict[str, list[Int[Tensor, " rows"]]]:
    """Rows of each operand quadrant and of each tercile of the result."""
    half = task.n_operand_values / 2
    quadrant = (readings.operands[:, 0] >= half).long() * 2 + (readings.operands[:, 1] >= half).long()
    order = readings.labels.float()
    bounds = torch.quantile(order, torch.tensor([1 / 3, 2 / 3], device=order.device))
    tercile = (order > bounds[0]).long() + (order > bounds[1]).long()
    return {
        "operand": [(quadrant == i).nonzero().squeeze(1) for i in range(4)],
        "result": [(tercile == i).nonzero().squeeze(1) for i in range(3)],
    }


def right_with_neurons(
    model: Any, task: Task, readings: Readings, rows: Int[Tensor, " k"], kept: Bool[Tensor, " n_neurons"]
) -> Bool[Tensor, " k"]:
    """Which rows are right when all neurons but ``kept`` are mean-ablated at the answer position."""
    mean = readings.neurons.mean(0)
    layers = torch.tensor(readings.layers, device=rows.device)
    hooks = []
    for layer in sorted(set(readings.layers)):
        mine = layers == layer

        def ablate(
            activation: Float[Tensor, "batch pos n"], hook: Any, keep: Tensor = kept[mine], value: Tensor = mean[mine]
        ) -> Tensor:
            activation = activation.clone()
            activation[:, -1] = torch.where(keep, activation[:, -1], value)
            return activation

        hooks.append((f"blocks.{layer}.mlp.hook_post", ablate))
    return answer_logits(model, task, readings.tokens[rows], hooks, cheap=True).argmax(-1) == readings.labels[rows]


def _importance_on(readings: Readings, rows: Tensor) -> Tensor:
    """Neurons ranked by their spread on a slice times their overall weight per unit of activation."""
    spread = (readings.neurons - readings.neurons.mean(0)).abs()
    per_unit = readings.importance / spread.mean(0).clamp_min(1e-9)
    return spread[rows].mean(0) * per_unit


def sufficient_set(model: Any, task: Task, readings: Readings, rows: Int[Tensor, " k"]) -> Bool[Tensor, " n_neurons"]:
    """The shortest prefix of neurons, by importance on the slice, that reaches 97 % of the intact accuracy on it."""
    order = _importance_on(readings, rows).argsort(descending=True)
    intact = float(readings.right[rows].float().mean())
    low, high = 0, len(order)
    while low < high:
        size = (low + high) // 2
        kept = torch.zeros(len(order), dtype=torch.bool, device=rows.device)
        kept[order[:size]] = True
        if float(right_with_neurons(model, task, readings, rows, kept).float().mean()) >= TARGET * intact:
            high = size
        else:
            low = size + 1
    kept = torch.zeros(len(order), dtype=torch.bool, device=rows.device)
    kept[order[:high]] = True
    return kept


def slice_transfer(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Accuracy of a slice's sufficient neurons on the other slices, as a share of their accuracy on their own.

    Neurons are chosen on half of the rows that a slice has and judged on the other half; all others are
    mean-ablated. The lower of the two ratios, over operand quadrants and result terciles, is reported. The control
    keeps as many neurons drawn at random.

    Source: ours; sufficiency by mean ablation as in Nikankin et al. 2025 (arXiv 2410.21272), equation 2.
    Fails when: a dense network needs nearly all of its neurons (``size`` above 0.9: the ratio is then trivially high
    and does not decide), or accuracy is at chance.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    details: dict[str, Any] = {}
    ratios: list[float] = []
    spread: list[float] = []
    random_accuracy: list[float] = []
    for kind, groups in slices(readings, task).items():
        halves = []
        for rows in groups:
            mixed = rows[torch.randperm(len(rows), generator=generator).to(rows.device)][:MOST_ROWS]
            halves.append((mixed[::2], mixed[1::2]))
        sets = [sufficient_set(model, task, readings, chosen) for chosen, _ in halves]
        table = torch.tensor(
            [
                [float(right_with_neurons(model, task, readings, held, kept).float().mean()) for _, held in halves]
                for kept in sets
            ]
        )
        own = table.diagonal()
        cross = (table.sum(1) - own) / (len(groups) - 1)
        for kept, (_, held) in zip(sets, halves, strict=True):
            drawn = torch.zeros_like(kept)
            drawn[torch.randperm(len(kept), generator=generator).to(kept.device)[: int(kept.sum())]] = True
            random_accuracy.append(float(right_with_neurons(model, task, readings, held, drawn).float().mean()))
        details |= {
            f"{kind}_self": float(own.mean()),
            f"{kind}_cross": float(cross.mean()),
            f"{kind}_size": float(torch.stack(sets).float().mean()),
        }
        each = cross / own.clamp_min(1e-6)
        ratios.append(float(cross.mean() / own.mean().clamp_min(1e-6)))
        spread.append(float(each.std() / len(each) ** 0.5))
    value = min(ratios)
    error = 1.96 * spread[ratios.index(value)]
    size = max(details["operand_size"], details["result_size"])
    own_accuracy = min(details["operand_self"], details["result_self"])
    informative = size <= 0.9 and own_accuracy >= 0.5
    return Evidence(
        test="slice-transfer",
        value=value,
        interval=(value - error, value + error),
        control=sum(random_accuracy) / len(random_accuracy),
        control_name="accuracy of as many random neurons on their own slice",
        threshold="ratio >= 0.80 for an algorithm, <= 0.85 counts towards heuristics",
        passed=(value >= 0.8) if informative else None,
        details=details,
        source="sufficiency by mean ablation: Nikankin et al. 2025, arXiv 2410.21272",
        seconds=time.perf_counter() - start,
    )
