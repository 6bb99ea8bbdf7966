"""Neurons that read waves of several frequencies at once: in later layers, and where their input is a sum of few."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from circuits.mechanisms.least_squares import block_fits
from circuits.mechanisms.neuron_features import wave_features
from circuits.mechanisms.neuron_forms import GOOD_FIT, Forms, some_rows
from circuits.mechanisms.readings import Readings, activations
from circuits.mechanisms.thresholds import RULE
from circuits.tasks.base import Task

MOST_SHARE, SLIGHT = 4, 0.02
"""A neuron reads at most one frequency of so many, each with such a share of what it reads."""
NEARLY_ALL = 0.95
"""Least held-out R2 of what a neuron reads. The first frequencies of a line that wraps around reach 0.9."""


def with_joint_waves(
    task: Task, readings: Readings, top: Int[Tensor, " k"], forms: Forms, keys: list[int], *, circle: int | None
) -> Forms:
    """Forms in which neurons of later layers are waves too if the key frequencies explain them together.

    What a layer reads of several waves of the layers before it has all of their frequencies.
    """
    layer = torch.tensor(readings.layers, device=top.device)[top]
    asked = ((layer > layer.min()) & (forms.family != 0)).nonzero().flatten()
    if not keys or not len(asked):
        return forms
    a, b, rows, fit, modulus = some_rows(task, readings.operands, seed=0, circle=circle)
    if len(keys) * MOST_SHARE > modulus:
        return forms
    features = wave_features(a, b, torch.tensor(keys, device=a.device), modulus).flatten(1)[:, None]
    share = block_fits(features, readings.neurons[rows][:, top[asked]], fit)[1][0]
    family = forms.family.clone()
    family[asked[share > GOOD_FIT]] = 0
    return replace(forms, family=family)


def with_read_waves(
    model: Any, task: Task, readings: Readings, top: Int[Tensor, " k"], forms: Forms
) -> tuple[Forms, list[int]]:
    """Return forms in which neurons of the first layer are waves too if few frequencies explain their inputs together.

    A neuron that reads waves of several frequencies bends their sum, which has all frequencies; what it reads has only
    those. They are the frequencies with a fiftieth of the inputs' variance or more, at most a quarter of all there are
    (embeddings without structure have all of them), and explain an input with a held-out R2 of 0.95 or more. Only of
    tasks on a circle, where no code of digits has few frequencies, and where single frequencies do not do.

    Args:
        model: the model that was read.
        task: a task whose answers wrap around; others give the forms as they are.
        readings: the model's readings.
        top: the neurons that the forms are of.
        forms: a form for each of them.

    Source: ours; frequencies by least squares on cos and sin as in Nanda et al. 2023 (arXiv 2301.05217), section 4.
    """
    layer = torch.tensor(readings.layers, device=top.device)[top]
    first = int(layer.min())
    mine = layer == first
    importance = readings.importance[top]
    hook = f"blocks.{first}.mlp.hook_pre"
    gated = f"blocks.{first}.mlp.hook_pre_linear" in model.hook_dict
    if task.period is None or gated or hook not in model.hook_dict:
        return forms, []
    if forms.of(mine).frequency_share(importance[mine]) >= RULE.frequency_share:
        return forms, []
    asked = (mine & (forms.family != 0)).nonzero().flatten()
    a, b, rows, fit, modulus = some_rows(task, readings.operands, seed=0, circle=None)
    read = activations(model, readings.tokens[rows], [hook], last=1)[hook][:, -1]
    inputs = read[:, top[asked] - sum(i < first for i in readings.layers)]
    every = torch.arange(1, modulus // 2 + 1, device=a.device)
    alone = block_fits(wave_features(a, b, every, modulus), inputs, fit)[1].clamp_min(0)
    power = (alone * importance[asked]).sum(1)
    keys = every[power >= SLIGHT * power.sum()]
    if not len(keys) or len(keys) * MOST_SHARE > modulus:
        return forms, []
    features = wave_features(a, b, keys, modulus).flatten(1)[:, None]
    share = block_fits(features, inputs, fit)[1][0]
    family = forms.family.clone()
    family[asked[share > NEARLY_ALL]] = 0
    return replace(forms, family=family), keys.tolist()
