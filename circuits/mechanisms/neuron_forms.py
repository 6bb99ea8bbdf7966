"""The form of each neuron: a wave of one frequency, a sum of hinges, a few indicators of the operands, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.mechanisms.groups import group_index
from circuits.mechanisms.least_squares import block_fits, greedy_fit
from circuits.mechanisms.neuron_features import (
    hinge_features,
    indicator_features,
    lowest_frequency,
    wave_features,
    wave_fit,
)
from circuits.tasks.base import Task

MOST_ROWS = 4096
GOOD_FIT, SLOW_FIT = 0.8, 0.95
CLEAR = 0.98
"""R2 from which on a form is not doubted."""
FAMILIES = ("frequency", "hinge", "indicator")


@dataclass(frozen=True, eq=False)
class Forms:
    """The family of each neuron (index into ``FAMILIES``, or their number for none), its R2 and its frequency."""

    family: Int[Tensor, " n"]
    best: Float[Tensor, " n"]
    frequency: Int[Tensor, " n"]
    slow: Bool[Tensor, " n"]
    """Waves with no whole period inside the operand range, which cannot be told from hinges: of no family but these."""
    undone: Bool[Tensor, " n"]
    """Neurons whose form is that of the neuron times what the norm before it divided by."""

    def of(self, chosen: Tensor) -> Forms:
        """Some of the neurons."""
        return Forms(*(column[chosen] for column in self._columns()))

    def or_better(self, others: Forms) -> Forms:
        """These forms, and those of the neurons that ``others`` fit better."""
        better = others.best > self.best
        return Forms(*(torch.where(better, y, x) for x, y in zip(self._columns(), others._columns(), strict=True)))

    def _columns(self) -> tuple[Tensor, ...]:
        return self.family, self.best, self.frequency, self.slow, self.undone

    def frequency_share(self, importance: Float[Tensor, " n"]) -> float:
        """Share of single-frequency neurons, slow waves left out of the count; 0 where these are more than half."""
        weight = importance / importance.sum().clamp_min(1e-12)
        slow = float(weight[self.slow & (self.family != 0)].sum())
        return float(weight[self.family == 0].sum()) / (1 - slow) if slow <= 0.5 else 0.0

    def shares(self, importance: Float[Tensor, " n"]) -> dict[str, float]:
        """Share of importance by family."""
        weight = importance / importance.sum().clamp_min(1e-12)
        return {name: float(weight[self.family == i].sum()) for i, name in enumerate((*FAMILIES, "none"))}


def neuron_forms(
    task: Task,
    operands: Int[Tensor, "rows 2"],
    neurons: Float[Tensor, "rows n"],
    *,
    seed: int,
    circle: int | None = None,
    before_norm: Float[Tensor, "rows n"] | None = None,
) -> Forms:
    """Fit every neuron by each family; a neuron belongs to the family with the best held-out R2 above 0.8.

    Hinges and indicators are only fitted where a wave leaves more than 2 % of the variance. ``before_norm``, neurons
    times what the norm before them divided by, takes a neuron's place where that fits better.
    """
    generator = torch.Generator().manual_seed(seed)
    keep = torch.arange(len(operands))
    if len(operands) > MOST_ROWS:
        keep = torch.randperm(len(operands), generator=generator)[:MOST_ROWS]
    fit = (torch.rand(len(keep), generator=generator) < 0.5).to(operands.device)
    keep = keep.to(operands.device)
    forms = _forms(task, operands[keep], neurons[keep], fit, circle)
    if before_norm is None:
        return forms
    return forms.or_better(_forms(task, operands[keep], before_norm[keep], fit, circle, undone=True))


def _forms(
    task: Task,
    operands: Int[Tensor, "rows 2"],
    neurons: Float[Tensor, "rows n"],
    fit: Bool[Tensor, " rows"],
    circle: int | None,
    *,
    undone: bool = False,
) -> Forms:
    renamed = group_index(task, operands, circle=circle)
    if renamed is None:
        raise BadInput(f"{task.name} has no renaming of its operands under which the answer is their sum")
    a, b, kept, modulus = renamed
    n = task.n_operand_values
    lowest = lowest_frequency(task, modulus)
    wave, frequency = wave_fit(a[kept], b[kept], neurons[kept], modulus, fit[kept], lowest=lowest)
    scores = torch.full((len(FAMILIES), neurons.shape[1]), -1.0, device=neurons.device)
    scores[0] = wave
    unclear = wave < CLEAR
    if bool(unclear.any()):
        scores[1, unclear] = greedy_fit(hinge_features(operands, n), neurons[:, unclear], fit)
        scores[2, unclear] = greedy_fit(indicator_features(operands, n), neurons[:, unclear], fit)
    best, family = scores.max(0)
    slow = torch.zeros_like(unclear)
    if lowest > 1:
        waves = wave_features(a[kept], b[kept], torch.arange(1, lowest, device=a.device), modulus)
        slow = block_fits(waves, neurons[kept], fit[kept])[1].amax(0) > SLOW_FIT
    named = torch.where(best > GOOD_FIT, family, torch.full_like(family, len(FAMILIES)))
    return Forms(named, best, frequency, slow, torch.full_like(slow, undone))


def renamed_wave_share(
    task: Task,
    operands: Int[Tensor, "rows 2"],
    versions: Sequence[Float[Tensor, "rows n"]],
    importance: Float[Tensor, " n"],
    *,
    seed: int,
    circle: int | None = None,
) -> float:
    """Importance-weighted share of neurons with a single frequency, in any version, when operands bear other names."""
    a, b, rows, fit, modulus = some_rows(task, operands, seed=seed, circle=circle)
    lowest = lowest_frequency(task, modulus)
    waves = [wave_fit(a, b, neurons[rows], modulus, fit, lowest=lowest)[0] for neurons in versions]
    return float(importance[torch.stack(waves).amax(0) > GOOD_FIT].sum() / importance.sum().clamp_min(1e-12))


def some_rows(
    task: Task, operands: Int[Tensor, "all 2"], *, seed: int, circle: int | None
) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"], Int[Tensor, " rows"], Bool[Tensor, " rows"], int]:
    """Some rows at random, of a task that has been fitted: operands in the group, which rows, half to fit, modulus."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(operands), generator=generator)[:MOST_ROWS].to(operands.device)
    fit = (torch.rand(len(rows), generator=generator) < 0.5).to(operands.device)
    renamed = group_index(task, operands[rows], circle=circle)
    assert renamed is not None
    a, b, kept, modulus = renamed
    return a[kept], b[kept], rows[kept], fit[kept], modulus


def key_frequencies(forms: Forms, importance: Float[Tensor, " n"], *, least: float = 0.05) -> list[int]:
    """Frequencies that carry at least ``least`` of the importance of the single-frequency neurons, ascending."""
    waves, frequency = forms.family == 0, forms.frequency
    total = importance[waves].sum().clamp_min(1e-12)
    return [
        int(k)
        for k in frequency[waves].unique().tolist()
        if float(importance[waves & (frequency == k)].sum() / total) >= least
    ]
