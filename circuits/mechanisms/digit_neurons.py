"""Digits in the neurons: does a part of their activations that only the low digits set move those, and the carry?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits._stats import wilson_interval
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.interchange import digit_bases, operand_embedding
from circuits.mechanisms.operand_parts import digit_swapped, two_way
from circuits.mechanisms.readings import Readings, answer_logits, decisive_layers, read
from circuits.mechanisms.thresholds import RULE
from circuits.tasks.base import Task

SWAPS = 1000


@dataclass(frozen=True, eq=False)
class Written:
    """Operands written to a base: what each value is written as, and back."""

    names: Int[Tensor, " n"]
    values: Int[Tensor, " n"]
    base: int

    def classes(self, operands: Int[Tensor, "rows 2"]) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Which pair of low digits, and which pair of high digits, each pair of operands has."""
        a, b = self.names[operands].T
        highest = len(self.names) // self.base + 1
        return a % self.base * self.base + b % self.base, a // self.base * highest + b // self.base

    def mixed(
        self, base: Int[Tensor, "rows 2"], source: Int[Tensor, "rows 2"], *, high: bool
    ) -> tuple[Int[Tensor, "rows 2"], Bool[Tensor, " rows"]]:
        """Operands with the source's low (or high) digits, and whether there are such values."""
        written = digit_swapped(self.names[base], self.names[source], self.base, high)
        there = (written < len(self.names)).all(1)
        return self.values[written.clamp(max=len(self.names) - 1)], there


def written(names: Int[Tensor, " n"], base: int) -> Written:
    """Operand values that are written as the given numbers."""
    values = torch.empty_like(names)
    values[names] = torch.arange(len(names))
    return Written(names, values, base)


@dataclass(frozen=True, eq=False)
class _Setting:
    model: Any
    task: Task
    readings: Readings
    swaps: tuple[Int[Tensor, "rows 2"], Int[Tensor, "rows 2"]]

    def held(self, layer: int, digits: Written) -> list[Bool[Tensor, " _"]]:
        """Which predictions hold when the low digits' part of a layer's neurons is the source's, and the high ones'."""
        of = torch.tensor(self.readings.layers, device=self.readings.labels.device) == layer
        operands = self.readings.operands.to(digits.names.device)
        rows = [x.to(of.device) for x in digits.classes(operands)]
        parts = two_way(self.readings.neurons[:, of], *rows)
        base, source = self.swaps
        found = []
        for high, part in ((False, parts[0]), (True, parts[1])):
            mixed, there = digits.mixed(base, source, high=high)
            predicted = self.task.answer(mixed)
            counts = there & torch.isin(predicted, self.task.answer_values) & (predicted != self.task.answer(base))
            low, top = (x[int(high)].to(of.device) for x in (digits.classes(base), digits.classes(source)))
            known = len(part) - 1  # pairs of digits that no row read has
            moved = (part[top.clamp(max=known)] - part[low.clamp(max=known)])[counts.to(of.device)]
            tokens = self.task.encode(base[counts]).inputs.to(of.device)

            def put(activation: Tensor, hook: Any, moved: Tensor = moved) -> Tensor:
                activation = activation.clone()
                activation[:, -1] = activation[:, -1] + moved.to(activation.dtype)
                return activation

            name = f"blocks.{layer}.mlp.hook_post"
            logits = answer_logits(self.model, self.task, tokens, [(name, put)], cheap=True)
            labels = torch.searchsorted(self.task.answer_values, predicted[counts]).to(of.device)
            found.append(logits.argmax(-1) == labels)
        return found


def digit_neurons(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Interchange accuracy of the operands' low digits, and of their high ones, inside the neurons.

    The activations of a decisive layer's neurons at the answer are split by least squares into a part that the pair of
    low digits sets and a part that the pair of high digits sets: h(a, b) = F(low a, low b) + G(high a, high b) + rest.
    F is taken from a source: the prediction is the answer with the source's low digits and the base's high ones, the
    carry of the source's units with it. Then G is. ``value`` is the lower share of the two, of the layer and base
    (those that ``interchange`` tries) where it is highest. Neurons that work on columns pass. Neurons that fire on
    ranges of the operands can be stored by digits too, and pass ``interchange``; but the ranges that overlap a column's
    end make an answer that no part of one column's own has, and they fail here.

    ``control`` is the same for operands renamed at random.

    Formula: max over layers and bases of min over F and G of mean over bases and sources of [answer with h - F(base) +
        F(source) = answer of the number whose low (for G: high) digits are the source's].

    Source: interchange accuracy: Geiger et al. 2021 (arXiv 2106.02997), definition 2; the two-way split is ours.
    Fails when: one neuron reads both columns (h is no sum): the algorithm may be there, but this cannot show it.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    n = task.n_operand_values
    generator = torch.Generator().manual_seed(seed + 3)
    base, source = (torch.randint(n, (SWAPS, 2), generator=generator) for _ in range(2))
    renamed = torch.randperm(n, generator=generator)
    setting = _Setting(model, task, readings, (base, source))
    accuracy = float(readings.right.float().mean())
    best: tuple[float, int, int, list[Tensor]] | None = None
    for number in digit_bases(task, readings, operand_embedding(model, task)):
        for layer in decisive_layers(model, task, readings):
            held = setting.held(layer, written(torch.arange(n), number))
            if best is None or min(map(_share, held)) > best[0]:
                best = min(map(_share, held)), number, layer, held
    nan = float("nan")
    value, interval, control, details = nan, (nan, nan), None, {}
    if best is not None:
        share, number, layer, held = best
        worst = min(held, key=_share)
        low, high = wilson_interval(int(worst.sum()), max(len(worst), 1))
        value, interval = _relative(share, accuracy), (_relative(low, accuracy), _relative(high, accuracy))
        control = max(map(_share, setting.held(layer, written(renamed, number))))
        details = {"digit_base": number, "layer": layer, "low": _share(held[0]), "high": _share(held[1])}
    return Evidence(
        test="digit-neurons",
        value=value,
        interval=interval,
        control=control,
        control_name="operands renamed at random",
        threshold="both digits >= 0.95 and renamed <= 0.10" if best else "not run: answers wrap around",
        passed=None if control is None else value >= RULE.interchange and control <= RULE.interchange_control,
        details=details,
        source="Geiger et al. 2021, arXiv 2106.02997",
        seconds=time.perf_counter() - start,
    )


def _share(right: Bool[Tensor, " rows"]) -> float:
    return float(right.float().mean()) if len(right) else 0.0


def _relative(share: float, accuracy: float) -> float:
    return min(1.0, share / max(accuracy, 1e-12))
