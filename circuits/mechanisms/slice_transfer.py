"""Slice transfer: do the neurons that suffice for one slice of inputs suffice for the others?"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from circuits._stats import resampling_counts
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.readings import Readings, answer_logits, read
from circuits.mechanisms.thresholds import RULE
from circuits.tasks.base import Task

TARGET = 0.97
"""Share of the intact accuracy on a slice that its neurons have to reach."""
MOST_ROWS = 600
"""Rows of a slice: one half chooses the neurons, the other judges them."""
DENSE = 0.9
"""Share of the neurons above which those of a slice are nearly all, and fit other slices trivially."""
WORKS = 0.5
"""Least accuracy of a slice's neurons on their own slice."""


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
            activation[:, -1] = torch.where(keep, activation[:, -1], value.to(activation.dtype))
            return activation

        hooks.append((f"blocks.{layer}.mlp.hook_post", ablate))
    return answer_logits(model, task, readings.tokens[rows], hooks, cheap=True).argmax(-1) == readings.labels[rows]


def _importance_on(readings: Readings, rows: Int[Tensor, " k"]) -> Float[Tensor, " n_neurons"]:
    """Neurons ranked by their spread within a slice times their overall weight per unit of activation.

    The spread is about the slice's own mean: a neuron that does the same for the whole slice tells no two of its inputs
    apart, however far from its mean over all inputs that is.
    """
    everywhere = (readings.neurons - readings.neurons.mean(0)).abs().mean(0)
    within = (readings.neurons[rows] - readings.neurons[rows].mean(0)).abs().mean(0)
    return within * readings.importance / everywhere.clamp_min(1e-9)


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
    keeps as many neurons drawn at random. The interval is over judged rows, redrawn within each slice, with the
    neurons as they were chosen.

    Neurons are added in the order of their spread about the slice's own mean, and all others are set to their mean over
    *all* inputs. Ranked by their distance from that mean, those that are silent on the slice would count as much as
    weak ones that are needed; lookups of ranges would then keep four fifths of their neurons for any slice, and so
    pass. Means over the slice itself would tell the network which slice it is on: what then suffices is so little that
    a trained column code transfers worse than a lookup (0.2 against 0.5).

    Formula: min over slicings of [mean over slices s != t of acc_t(N_s)] / [mean over s of acc_s(N_s)], with
        N_s the fewest neurons, all others at their mean over all inputs, that keep the accuracy on slice s, and
        acc_t the accuracy on judged rows of slice t.

    Source: ours; sufficiency by mean ablation as in Nikankin et al. 2025 (arXiv 2410.21272), equation 2.
    Fails when: a dense network needs nearly all of its neurons (``size`` above 0.9: the ratio is then trivially high
    and does not decide), or accuracy is at chance.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    details: dict[str, Any] = {}
    ratios: list[float] = []
    drawn_ratios: list[NDArray[np.float64]] = []
    random_accuracy: list[float] = []
    for kind, groups in slices(readings, task).items():
        halves = []
        for rows in groups:
            mixed = rows[torch.randperm(len(rows), generator=generator).to(rows.device)][:MOST_ROWS]
            halves.append((mixed[::2], mixed[1::2]))
        sets = [sufficient_set(model, task, readings, chosen) for chosen, _ in halves]
        # for each slice that is judged, whether each of its rows is right by each slice's neurons
        right = [
            torch.stack([right_with_neurons(model, task, readings, held, kept) for kept in sets]).cpu().numpy()
            for _, held in halves
        ]
        for kept, (_, held) in zip(sets, halves, strict=True):
            drawn = torch.zeros_like(kept)
            drawn[torch.randperm(len(kept), generator=generator).to(kept.device)[: int(kept.sum())]] = True
            random_accuracy.append(float(right_with_neurons(model, task, readings, held, drawn).float().mean()))
        own, cross = (float(x[0]) for x in own_and_cross(np.stack([rows.mean(1) for rows in right], axis=1)[None]))
        details |= {
            f"{kind}_self": own,
            f"{kind}_cross": cross,
            f"{kind}_size": float(torch.stack(sets).float().mean()),
        }
        ratios.append(cross / max(own, 1e-6))
        drawn_ratios.append(resampled_ratios(right, seed=seed))
    size = max(details["operand_size"], details["result_size"])
    own_accuracy = min(details["operand_self"], details["result_self"])
    informative = size <= DENSE and own_accuracy >= WORKS
    low, high = np.quantile(np.min(drawn_ratios, axis=0), [0.025, 0.975])
    return Evidence(
        test="slice-transfer",
        value=min(ratios),
        interval=(float(low), float(high)),
        control=sum(random_accuracy) / len(random_accuracy),
        control_name="accuracy of as many random neurons on their own slice",
        threshold=f"ratio >= {RULE.slice_algorithm:.2f} for an algorithm, <= {RULE.slice_heuristic:.2f} counts towards "
        "heuristics",
        passed=(min(ratios) >= RULE.slice_algorithm) if informative else None,
        details=details,
        source="sufficiency by mean ablation: Nikankin et al. 2025, arXiv 2410.21272",
        seconds=time.perf_counter() - start,
    )


def own_and_cross(tables: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return for each table the mean accuracy of each slice's neurons on their own slice, and on the others.

    Rows of a table are whose neurons they are, columns which slice is judged.
    """
    own = np.trace(tables, axis1=1, axis2=2)
    n = tables.shape[-1]
    return own / n, (tables.sum((1, 2)) - own) / (n * (n - 1))


def resampled_ratios(right: list[NDArray[np.bool_]], *, seed: int) -> NDArray[np.float64]:
    """Return the ratio of cross to own accuracy in each of a thousand samples of the judged rows of each slice.

    ``right`` has a table for each slice that is judged: whose neurons they are, by its rows. A row is drawn for all
    neurons at once.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 8 (several samples).
    """
    means = [resampling_counts(rows.shape[1], seed=seed + i) @ rows.T / rows.shape[1] for i, rows in enumerate(right)]
    own, cross = own_and_cross(np.stack(means, axis=2))
    ratios: NDArray[np.float64] = cross / np.maximum(own, 1e-6)
    return ratios
