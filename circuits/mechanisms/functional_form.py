"""Functional form per neuron: a single-frequency wave, a sum of hinges, or a few indicators of the operands?"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import bootstrap_interval
from circuits.errors import BadInput
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.least_squares import block_fits, greedy_fit
from circuits.mechanisms.readings import Readings, decisive_layers, group_index, read
from circuits.tasks.base import Task

TOP_NEURONS = 512
MOST_ROWS = 4096
GOOD_FIT = 0.8
FAMILIES = ("frequency", "hinge", "indicator")


def wave_fit(
    a: Int[Tensor, " rows"],
    b: Int[Tensor, " rows"],
    neurons: Float[Tensor, "rows n"],
    modulus: int,
    fit: Bool[Tensor, " rows"],
    *,
    lowest: int = 1,
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Held-out R2 of the best single frequency for each neuron, and that frequency.

    Frequencies from ``lowest`` up are tried; the basis is
    {1, cos wa, sin wa} x {1, cos wb, sin wb}: 8 coefficients besides the constant.

    Source: Nanda et al. 2023 (arXiv 2301.05217), section 4.2 (share of a neuron's variance in one frequency).
    """
    frequencies = torch.arange(lowest, modulus // 2 + 1, device=a.device)
    inside, outside = block_fits(wave_features(a, b, frequencies, modulus), neurons, fit)
    # the frequency is chosen on the fitting half, its R2 is read on the other half
    which = inside.argmax(0)
    return outside.gather(0, which[None]).squeeze(0), which + lowest


def wave_features(
    a: Int[Tensor, " rows"], b: Int[Tensor, " rows"], frequencies: Int[Tensor, " k"], modulus: int
) -> Float[Tensor, "rows k 9"]:
    """{1, cos wa, sin wa} x {1, cos wb, sin wb} for each frequency, w = 2 pi k / modulus."""
    waves = []
    for x in (a, b):
        phase = x[:, None] * frequencies % modulus * (2 * math.pi / modulus)
        waves.append(torch.stack([torch.ones_like(phase), phase.cos(), phase.sin()], dim=-1))
    return torch.einsum("rki,rkj->rkij", *waves).flatten(2)


def lowest_frequency(task: Task, modulus: int) -> int:
    """1 on a circle; on a line, the first frequency with a whole period inside the operand range.

    Longer waves are monotone over the range and pass for any magnitude code.
    """
    return 1 if task.period else -(-modulus // task.n_operand_values)


def hinge_features(operands: Int[Tensor, "rows 2"], n: int) -> Float[Tensor, "rows features"]:
    """relu(x - t) and relu(t - x) for x in a, b, a+b, a-b and thresholds t over its range (at most 64 each)."""
    a, b = operands[:, 0].float(), operands[:, 1].float()
    columns = []
    for x, low, high in ((a, 0, n), (b, 0, n), (a + b, 0, 2 * n), (a - b, -n, n)):
        thresholds = torch.linspace(low, high - 1, min(64, high - low), device=a.device).round().unique()
        above = x[:, None] - thresholds[None, :]
        columns += [torch.relu(above), torch.relu(-above)]
    return torch.cat(columns, dim=1)


def indicator_features(operands: Int[Tensor, "rows 2"], n: int) -> Float[Tensor, "rows features"]:
    """Indicators: x >= t, x in a decade, residues 2 to 10, cells of decades, digit sums, the units' carry.

    Source: the taxonomy of Nikankin et al. 2025 (arXiv 2410.21272), appendix E (range, modulo, pattern,
    identical operands), with conjunctions of ranges added.
    """
    a, b = operands[:, 0], operands[:, 1]
    columns = []
    for x, low, high in ((a, 0, n), (b, 0, n), (a + b, 0, 2 * n), (a - b, -n, n)):
        thresholds = torch.linspace(low + 1, high - 1, min(64, high - low), device=a.device).round().unique()
        columns.append(x[:, None] >= thresholds[None, :])
        bands = torch.arange(low // 10, (high + 9) // 10, device=a.device)
        columns.append(torch.div(x, 10, rounding_mode="floor")[:, None] == bands[None, :])
        for m in range(2, 11):
            columns.append((x % m)[:, None] == torch.arange(m, device=a.device)[None, :])
    decades = torch.arange((n + 9) // 10, device=a.device)
    cells = ((a // 10)[:, None] == decades)[:, :, None] & ((b // 10)[:, None] == decades)[:, None, :]
    units = a % 10 + b % 10
    tens = a // 10 + b // 10
    columns += [cells.flatten(1), units[:, None] == torch.arange(19, device=a.device)]
    columns.append(tens[:, None] == torch.arange(2 * len(decades) - 1, device=a.device))
    columns += [(units >= 10)[:, None], (a == b)[:, None]]
    return torch.cat([c.float() for c in columns], dim=1)


@dataclass(frozen=True, eq=False)
class Forms:
    """The family of each neuron (index into ``FAMILIES``, or their number for none), its R2 and its frequency."""

    family: Int[Tensor, " n"]
    best: Float[Tensor, " n"]
    frequency: Int[Tensor, " n"]

    def shares(self, importance: Float[Tensor, " n"]) -> dict[str, float]:
        """Share of importance by family."""
        weight = importance / importance.sum().clamp_min(1e-12)
        return {name: float(weight[self.family == i].sum()) for i, name in enumerate((*FAMILIES, "none"))}


def neuron_forms(task: Task, operands: Int[Tensor, "rows 2"], neurons: Float[Tensor, "rows n"], *, seed: int) -> Forms:
    """Fit every neuron by each family; a neuron belongs to the family with the best held-out R2 above 0.8.

    Hinges and indicators are only fitted where a wave leaves more than 2 % of the variance.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(operands) > MOST_ROWS:
        keep = torch.randperm(len(operands), generator=generator)[:MOST_ROWS].to(operands.device)
        operands, neurons = operands[keep], neurons[keep]
    fit = (torch.rand(len(operands), generator=generator) < 0.5).to(operands.device)
    renamed = group_index(task, operands)
    if renamed is None:
        raise BadInput(f"{task.name} has no renaming of its operands under which the answer is their sum")
    a, b, kept, modulus = renamed
    n = task.n_operand_values
    lowest = lowest_frequency(task, modulus)
    wave, frequency = wave_fit(a[kept], b[kept], neurons[kept], modulus, fit[kept], lowest=lowest)
    scores = torch.full((len(FAMILIES), neurons.shape[1]), -1.0, device=neurons.device)
    scores[0] = wave
    unclear = wave < 0.98
    if bool(unclear.any()):
        scores[1, unclear] = greedy_fit(hinge_features(operands, n), neurons[:, unclear], fit)
        scores[2, unclear] = greedy_fit(indicator_features(operands, n), neurons[:, unclear], fit)
    best, family = scores.max(0)
    return Forms(torch.where(best > GOOD_FIT, family, torch.full_like(family, len(FAMILIES))), best, frequency)


def renamed_wave_share(
    task: Task, operands: Int[Tensor, "rows 2"], neurons: Float[Tensor, "rows n"], importance: Tensor, *, seed: int
) -> float:
    """Importance-weighted share of single-frequency neurons when operands bear other names."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.randperm(len(operands), generator=generator)[:MOST_ROWS].to(operands.device)
    fit = (torch.rand(len(keep), generator=generator) < 0.5).to(operands.device)
    renamed = group_index(task, operands[keep])
    assert renamed is not None  # the same task has just been fitted
    a, b, kept, modulus = renamed
    lowest = lowest_frequency(task, modulus)
    wave, _ = wave_fit(a[kept], b[kept], neurons[keep][kept], modulus, fit[kept], lowest=lowest)
    return float(importance[wave > GOOD_FIT].sum() / importance.sum().clamp_min(1e-12))


def key_frequencies(forms: Forms, importance: Float[Tensor, " n"], *, least: float = 0.05) -> list[int]:
    """Frequencies that carry at least ``least`` of the importance of the single-frequency neurons, ascending."""
    waves, frequency = forms.family == 0, forms.frequency
    total = importance[waves].sum().clamp_min(1e-12)
    return [
        int(k)
        for k in frequency[waves].unique().tolist()
        if float(importance[waves & (frequency == k)].sum() / total) >= least
    ]


def fitted(model: Any, task: Task, readings: Readings, *, seed: int) -> tuple[Int[Tensor, " k"], Forms]:
    """Return the neurons that are fitted, most important first, and their forms; fitted once for all tests."""
    key = f"forms {seed}"
    if key not in readings.remembered:
        top = _most_important(readings, decisive_layers(model, task, readings))
        readings.remembered[key] = top, neuron_forms(task, readings.operands, readings.neurons[:, top], seed=seed)
    found: tuple[Tensor, Forms] = readings.remembered[key]
    return found


def wave_frequencies(model: Any, task: Task, readings: Readings, *, seed: int, n: int = 128) -> list[int]:
    """Key frequencies of the ``n`` most important neurons."""
    top, forms = fitted(model, task, readings, seed=seed)
    first = Forms(forms.family[:n], forms.best[:n], forms.frequency[:n])
    return key_frequencies(first, readings.importance[top[:n]])


def _most_important(readings: Readings, layers: tuple[int, ...]) -> Int[Tensor, " k"]:
    """The most important neurons, of all and of each of some layers, that are not constant."""
    of = torch.tensor(readings.layers, device=readings.importance.device)
    order = readings.importance.argsort(descending=True)
    chosen = torch.cat([order[:TOP_NEURONS], *(order[of[order] == layer][:TOP_NEURONS] for layer in layers)]).unique()
    chosen = chosen[readings.importance[chosen].argsort(descending=True)]
    return chosen[readings.neurons[:, chosen].std(0) > 1e-6]


def _shares_by_layer(
    forms: Forms, importance: Tensor, layer: Tensor, decisive: tuple[int, ...]
) -> dict[int, dict[str, float]]:
    """Share of importance by family within each decisive layer."""
    out = {}
    for i in decisive:
        mine = layer == i
        out[i] = Forms(forms.family[mine], forms.best[mine], forms.frequency[mine]).shares(importance[mine])
    return out


def functional_form(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Importance-weighted share of neurons that are functions of one frequency of the operands.

    Each of the 512 most important neurons is assigned to the family with the best held-out R2, if that exceeds 0.8:
    a single frequency (8 coefficients), 8 greedy hinges in a, b, a+b, a-b, or 8 greedy indicators. The
    control repeats it after renaming the operands by a random permutation, which destroys waves and hinges in
    value but keeps everything that a lookup by token could do. ``frequency_least``, ``hinge_least`` and
    ``indicator_least`` are the lowest shares within a layer without which answers go wrong: an algorithm has to
    account for every layer that the answer passes through, not for the first alone.

    Source: Nanda et al. 2023 (arXiv 2301.05217) for frequencies; families and weighting are ours.
    Fails when: low frequencies of a large period pass for hinges; a column code and a range code are both indicators.
    """
    start = time.perf_counter()
    readings = readings or read(model, task, seed=seed)
    top, forms = fitted(model, task, readings, seed=seed)
    neurons, importance = readings.neurons[:, top], readings.importance[top]
    shares = forms.shares(importance)
    generator = torch.Generator().manual_seed(seed + 1)
    renaming = torch.randperm(task.n_operand_values, generator=generator).to(readings.operands.device)
    null = renamed_wave_share(task, renaming[readings.operands], neurons, importance, seed=seed)
    weighted = torch.stack([importance * (forms.family == 0), importance], dim=1).cpu().numpy()
    by_layer = _shares_by_layer(
        forms, importance, torch.tensor(readings.layers, device=top.device)[top], decisive_layers(model, task, readings)
    )
    details = shares | {
        **{f"{name}_least": min(of[name] for of in by_layer.values()) for name in FAMILIES},
        "by_layer": {str(layer): of for layer, of in by_layer.items()},
        "key_frequencies": key_frequencies(forms, importance),
        "n_neurons": len(top),
        "importance_covered": float(importance.sum() / readings.importance.sum().clamp_min(1e-12)),
    }
    return Evidence(
        test="functional-form",
        value=shares["frequency"],
        interval=bootstrap_interval(weighted, lambda rows: rows[:, 0].sum() / rows[:, 1].sum(), seed=seed),
        control=null,
        control_name="operands renamed at random",
        threshold="single-frequency share >= 0.75 for a Fourier algorithm",
        passed=shares["frequency"] >= 0.75,
        details=details,
        source="Nanda et al. 2023, arXiv 2301.05217, section 4.2",
        seconds=time.perf_counter() - start,
    )
