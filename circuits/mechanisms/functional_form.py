"""Functional form per neuron: a single-frequency wave, a sum of hinges, or a few indicators of the operands?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._stats import bootstrap_interval
from circuits.mechanisms.evidence import Evidence
from circuits.mechanisms.groups import group_index, operation_of
from circuits.mechanisms.least_squares import block_fits, class_means
from circuits.mechanisms.neuron_features import lowest_frequency, wave_features
from circuits.mechanisms.neuron_forms import (
    CLEAR,
    FAMILIES,
    GOOD_FIT,
    Forms,
    key_frequencies,
    neuron_forms,
    renamed_wave_share,
)
from circuits.mechanisms.read_waves import MOST_SHARE, SLIGHT, with_joint_waves, with_read_waves
from circuits.mechanisms.readings import Readings, decisive_layers, read, varies
from circuits.mechanisms.thresholds import RULE
from circuits.tasks.base import Task

TOP_NEURONS = 512
PROBED, PROBED_ROWS = 48, 1024
"""Neurons and rows that circles of other lengths are tried on."""
FINER, LONGEST = 4, 2
NO_WORSE = 0.005
"""By how much a shorter circle may fit worse."""
FEW_WAVES = 0.1
"""Share of importance below which waves are stray neurons, and say nothing of a circle."""
DECODES, DECODER_HITS, DECODER_SHARE = 3, 0.5, 0.75
"""A neuron that is on for fewer results decodes one; a layer of such neurons is no part of an algorithm."""


def circle_length(model: Any, task: Task, readings: Readings, *, seed: int) -> int | None:
    """Number of steps of the circle on which neurons are single-frequency waves; None: the one that the task implies.

    Addition that does not wrap around can be done on any circle that holds all answers. That of as many steps as there
    are answers is tried first, and kept where waves on it leave next to nothing unexplained. Where they leave more, of
    all circles up to ``LONGEST`` times as long the one is taken on which the waves that there are fit best: on a circle
    that is slightly too long or too short a wave is out of step at one end of the operands.

    Source: ours; periods of language models need not divide the range: Zhou et al. 2024 (arXiv 2406.03445).
    """
    key = f"circle {seed}"
    if key in readings.remembered:
        known: int | None = readings.remembered[key]
        return known
    readings.remembered[key] = None
    if task.period is None and operation_of(task) in ("+", "-"):
        top = _most_important(readings, decisive_layers(model, task, readings))[:PROBED]
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(readings.operands), generator=generator)[:PROBED_ROWS].to(top.device)
        fit = torch.rand(len(rows), generator=generator) < 0.5
        versions = tuple(neurons[rows] for neurons in _versions(readings, top))
        probe = Probe(task, readings.operands[rows], versions, readings.importance[top], fit)
        readings.remembered[key] = probe.longer_circle()
    found: int | None = readings.remembered[key]
    return found


def _versions(readings: Readings, chosen: Int[Tensor, " k"]) -> tuple[Float[Tensor, "rows k"], ...]:
    """Some neurons as they are, and, where a norm is before them, without what it divided by."""
    before = readings.before_norm(chosen)
    return (readings.neurons[:, chosen],) if before is None else (readings.neurons[:, chosen], before)


@dataclass(frozen=True, eq=False)
class Probe:
    """Some rows of some neurons, in one version or more, to try circles on."""

    task: Task
    operands: Int[Tensor, "rows 2"]
    versions: tuple[Float[Tensor, "rows n"], ...]
    importance: Float[Tensor, " n"]
    fit: Bool[Tensor, " rows"]

    def scores(self, circle: int, frequencies: Sequence[int]) -> Float[Tensor, "frequencies n"]:
        """Held-out R2 of each neuron at each frequency of a circle, in the version that fits best."""
        renamed = group_index(self.task, self.operands, circle=circle)
        assert renamed is not None
        a, b, _, _ = renamed
        features = wave_features(a, b, torch.tensor(frequencies, device=a.device), circle)
        return torch.stack([block_fits(features, neurons, self.fit)[1] for neurons in self.versions]).amax(0)

    def mean(self, best: Float[Tensor, " n"], waves: Bool[Tensor, " n"]) -> float:
        """Importance-weighted mean of the R2 of some neurons."""
        weight = self.importance[waves]
        return float((best[waves].clamp_min(0) * weight).sum() / weight.sum().clamp_min(1e-12))

    def longer_circle(self) -> int | None:
        """The circle with the best fits, if they are better than on the shortest."""
        shortest = len(self.task.answer_values)
        lowest = lowest_frequency(self.task, shortest)
        plain = self.scores(shortest, range(lowest, shortest // 2 + 1)).amax(0)
        if self.mean(plain, torch.ones_like(plain, dtype=torch.bool)) >= CLEAR:
            return None
        fine = FINER * shortest
        scores = self.scores(fine, range(1, fine // 2 + 1))
        # a wave without a whole period inside the operand range fits hinges, and no circle well or badly
        waves = (scores.amax(0) > GOOD_FIT) & (scores.argmax(0) + 1 >= FINER * lowest)
        share = self.importance[waves].sum() / self.importance.sum().clamp_min(1e-12)
        if share < FEW_WAVES or self.mean(plain, waves) >= CLEAR:
            return None
        # cycles per step, to within an eighth of a step of the shortest circle
        cycles = (scores.argmax(0)[waves] + 1) / fine
        tried = {}
        for circle in range(shortest, LONGEST * shortest):
            near = (cycles * circle).round().long().clamp_min(1).unique().tolist()
            tried[circle] = self.mean(self.scores(circle, near).amax(0), waves)
        best = max(tried.values())
        # of circles that fit as well, the shortest: a multiple of the true one has all of its frequencies
        found = min(circle for circle, score in tried.items() if score >= best - NO_WORSE)
        return found if found > shortest else None


def fitted(model: Any, task: Task, readings: Readings, *, seed: int) -> tuple[Int[Tensor, " k"], Forms]:
    """Return the neurons that are fitted, most important first, and their forms; fitted once for all tests."""
    key = f"forms {seed}"
    if key not in readings.remembered:
        top = _most_important(readings, decisive_layers(model, task, readings))
        circle = circle_length(model, task, readings, seed=seed)
        neurons, *before = _versions(readings, top)
        forms = neuron_forms(
            task, readings.operands, neurons, seed=seed, circle=circle, before_norm=before[0] if before else None
        )
        readings.remembered[key] = top, forms
    found: tuple[Tensor, Forms] = readings.remembered[key]
    return found


def wave_frequencies(model: Any, task: Task, readings: Readings, *, seed: int, n: int = 128) -> list[int]:
    """Key frequencies of the ``n`` most important neurons."""
    top, forms = fitted(model, task, readings, seed=seed)
    return key_frequencies(forms.of(torch.arange(len(top))[:n]), readings.importance[top[:n]])


def most_frequencies(model: Any, task: Task, readings: Readings, modulus: int, *, seed: int) -> int:
    """The largest number of frequencies that a test tries: half of all there are, or as many as neurons have."""
    top, forms = fitted(model, task, readings, seed=seed)
    return max(1, modulus // MOST_SHARE, len(key_frequencies(forms, readings.importance[top], least=SLIGHT)))


def _most_important(readings: Readings, layers: tuple[int, ...]) -> Int[Tensor, " k"]:
    """The most important neurons, of all and of each of some layers, that are not constant."""
    of = torch.tensor(readings.layers, device=readings.importance.device)
    order = readings.importance.argsort(descending=True)
    chosen = torch.cat([order[:TOP_NEURONS], *(order[of[order] == layer][:TOP_NEURONS] for layer in layers)]).unique()
    chosen = chosen[readings.importance[chosen].argsort(descending=True)]
    return chosen[varies(readings.neurons[:, chosen])]


def decodes(labels: Int[Tensor, " rows"], neurons: Float[Tensor, "rows n"], n_answers: int) -> Bool[Tensor, " n"]:
    """Which neurons tell one result, or two, from all others: they fire mostly on it, and on most inputs that have it.

    Half of its mean at the result where that is largest counts as firing. A neuron of one pair is none: it misses the
    other pairs with that result.
    """
    mean = class_means(neurons, labels, n_answers)
    half = (mean.amax(0) + mean.amin(0)) / 2
    on, fires = mean > half, neurons > half
    hit = (fires & on[labels]).sum(0)
    few = on.sum(0) < DECODES
    return few & (hit >= DECODER_HITS * fires.sum(0)) & (hit >= DECODER_HITS * on[labels].sum(0))


def _shares_by_layer(
    forms: Forms, importance: Tensor, layer: Tensor, decisive: tuple[int, ...], decoding: Bool[Tensor, " n"]
) -> dict[int, dict[str, float]]:
    """Share of importance by family within each decisive layer, but for layers that only decode the result."""
    out: dict[int, dict[str, float]] = {}
    last: dict[int, dict[str, float]] = {}
    for i in decisive:
        mine = layer == i
        shares = forms.of(mine).shares(importance[mine])
        shares["frequency"] = forms.of(mine).frequency_share(importance[mine])
        decoders = float(importance[mine & decoding].sum() / importance[mine].sum().clamp_min(1e-12))
        (last if decoders >= DECODER_SHARE else out)[i] = shares
    return out or last


def functional_form(model: Any, task: Task, *, seed: int = 0, readings: Readings | None = None) -> Evidence:
    """Importance-weighted share of neurons that are functions of one frequency of the operands.

    Each of the 512 most important neurons is assigned to the family with the best held-out R2, if that exceeds 0.8:
    a single frequency (8 coefficients), 8 greedy hinges in a, b, a+b, a-b, or 8 greedy indicators. The
    control repeats it after renaming the operands by a random permutation, which destroys waves and hinges in
    value but keeps everything that a lookup by token could do. ``frequency_least``, ``hinge_least`` and
    ``indicator_least`` are the lowest shares within a layer without which answers go wrong: an algorithm has to
    account for every layer that the answer passes through, not for the first alone. A neuron of a later layer, which
    reads waves of several frequencies, counts there as a wave too if the key frequencies explain it together (held-out
    R2 >= 0.8; ``joint`` is the share of importance of such neurons). So does one of the first layer, on a circle, if
    few frequencies explain together what it reads (``read_frequencies``). Layers whose neurons each stand for one
    result say nothing of how it was found and are left out. A norm before an MLP divides what neurons read by
    a number that depends on both operands: there each neuron is looked at times that number too, and has the form that
    fits better (``norm_undone`` is the share of importance that has it so).

    Formula: sum over neurons i of importance_i [best family of i is a single frequency and its held-out R2 >=
        0.8] / sum of importance_i, with importance_i = mean over pairs of abs(gradient of the right logit x
        (activation - its mean)).

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
    circle = circle_length(model, task, readings, seed=seed)
    null = renamed_wave_share(
        task, renaming[readings.operands], _versions(readings, top), importance, seed=seed, circle=circle
    )
    weighted = torch.stack([importance * (forms.family == 0), importance], dim=1).cpu().numpy()
    layer = torch.tensor(readings.layers, device=top.device)[top]
    decoding = decodes(readings.labels, neurons, len(task.answer_values))
    decisive = decisive_layers(model, task, readings)
    keys = key_frequencies(forms, importance)
    joint = with_joint_waves(task, readings, top, forms, keys, circle=circle)
    joint, read_frequencies = with_read_waves(model, task, readings, top, joint)
    by_layer = _shares_by_layer(joint, importance, layer, decisive, decoding)
    details = shares | {
        **{f"{name}_least": min(of[name] for of in by_layer.values()) for name in FAMILIES},
        "decoding_layers": [i for i in decisive if i not in by_layer],
        "by_layer": {str(layer): of for layer, of in by_layer.items()},
        "key_frequencies": keys,
        "joint": joint.shares(importance)["frequency"] - shares["frequency"],
        "read_frequencies": read_frequencies,
        "n_neurons": len(top),
        "circle": circle,
        "norm_undone": float(importance[forms.undone].sum() / importance.sum().clamp_min(1e-12)),
        "importance_covered": float(importance.sum() / readings.importance.sum().clamp_min(1e-12)),
    }
    return Evidence(
        test="functional-form",
        value=shares["frequency"],
        interval=bootstrap_interval(weighted, lambda rows: rows[:, 0].sum() / rows[:, 1].sum(), seed=seed),
        control=null,
        control_name="operands renamed at random",
        threshold=f"single-frequency share >= {RULE.frequency_share:.2f} for a Fourier algorithm",
        passed=shares["frequency"] >= RULE.frequency_share,
        details=details,
        source="Nanda et al. 2023, arXiv 2301.05217, section 4.2",
        seconds=time.perf_counter() - start,
    )
