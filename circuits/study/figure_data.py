"""The numbers behind a run's figures in the report: training curves, Fourier spectrum, neuron maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.mechanisms.readings import has_one_answer_token, mlp_layers, read
from circuits.model import Transformer
from circuits.tasks.base import Task

if TYPE_CHECKING:
    import pandas as pd

CURVE_POINTS = 300
NEURONS = 8
MAP_SIDE = 120
"""Neuron maps show at most this many values of each operand, from 0 (120 fits p = 113 whole)."""
PROFILE_PARTNERS = 64
"""Second operands over which a neuron is averaged to get its dependence on the first."""


def figure_data(model: Transformer, task: Task, metrics: pd.DataFrame) -> dict[str, Any]:
    """What ``figures.json`` holds: ``training``, ``fourier`` and ``neurons``.

    The last two are None for tasks whose answer has several tokens, and for models without an MLP.

    Source: the spectrum of the embedding over operand values is that of Nanda et al. 2023 (arXiv 2301.05217), figure 3.
    Fails when: never for the reader's purpose; but a spectrum describes and is no evidence of its own.
    """
    data: dict[str, Any] = {"training": training_curves(metrics), "fourier": None, "neurons": None}
    if not (has_one_answer_token(task) and mlp_layers(model)):
        return data
    readings = read(model, task)
    importance = readings.importance / readings.importance.sum().clamp_min(1e-12)
    top = importance.argsort(descending=True, stable=True)[:NEURONS]
    maps = neuron_maps(model, task, top)
    data["fourier"] = fourier_shares(model, task, importance)
    data["neurons"] = {
        "layer": [readings.layers[i] for i in top.tolist()],
        "index": [i - readings.layers.index(readings.layers[i]) for i in top.tolist()],
        "importance": _short(importance[top]),
        "x_title": "second operand",
        "y_title": "first operand",
        "maps": [[_short(row) for row in map_] for map_ in maps],
    }
    return data


def training_curves(metrics: pd.DataFrame) -> dict[str, list[Any]]:
    """The columns of a run's metrics, at most ``CURVE_POINTS`` + 1 rows, first and last among them; absent is None."""
    stride = max(1, -(-len(metrics) // CURVE_POINTS))
    rows = sorted({*range(0, len(metrics), stride), len(metrics) - 1} - {-1})
    kept = metrics.iloc[rows].astype(object)
    return {str(name): kept[name].where(kept[name].notna(), None).tolist() for name in kept.columns}


def fourier_shares(model: Transformer, task: Task, importance: Float[Tensor, " neuron"]) -> dict[str, Any]:
    """Share of the variance over the first operand's values at each frequency, of embedding and neurons.

    A neuron counts by its importance; its dependence on the first operand is its mean over second operands.
    """
    n = task.n_operand_values
    values = torch.arange(n)
    partners = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:PROFILE_PARTNERS]
    pairs = torch.stack([values.repeat_interleave(len(partners)), partners.repeat(n)], dim=1)
    profile = neurons_at_answer(model, task, pairs).unflatten(0, (n, len(partners))).mean(1)
    operand_tokens = task.encode(torch.stack([values, values], dim=1)).tokens[:, 0]
    embedding = power(model.W_E.detach()[operand_tokens.to(model.W_E.device)]).sum(1)
    neurons = power(profile)
    neurons = neurons / neurons.sum(0).clamp_min(1e-12) @ importance
    return {
        "frequency": list(range(1, n // 2 + 1)),
        "embedding": _short(embedding / embedding.sum().clamp_min(1e-12)),
        "neurons": _short(neurons / neurons.sum().clamp_min(1e-12)),
    }


def power(functions: Float[Tensor, "n column"]) -> Float[Tensor, "frequency column"]:
    """Variance of each column at frequencies 1 ... n // 2, as functions on the integers modulo n."""
    amplitude = torch.fft.rfft(functions.float(), dim=0)[1:].abs().square()
    if len(functions) % 2 == 0:
        amplitude[-1] /= 2  # at the highest frequency of an even n there is no sine beside the cosine
    return amplitude


def neuron_maps(model: Transformer, task: Task, neurons: Int[Tensor, " k"]) -> Float[Tensor, "k first second"]:
    """Activation of some neurons over first and second operand, at most ``MAP_SIDE`` values of each."""
    side = min(task.n_operand_values, MAP_SIDE)
    flat = torch.arange(side * side)
    pairs = torch.stack([flat // side, flat % side], dim=1)
    return neurons_at_answer(model, task, pairs)[:, neurons].T.unflatten(1, (side, side))


def neurons_at_answer(
    model: Transformer, task: Task, operands: Int[Tensor, "rows 2"]
) -> Float[Tensor, "rows n_neurons"]:
    """MLP activations after the non-linearity at the answer position, all layers side by side."""
    names = [f"blocks.{layer}.mlp.hook_post" for layer in mlp_layers(model)]
    parts = []
    with torch.no_grad():
        for tokens in task.encode(operands).inputs.to(model.W_E.device).split(4096):
            _, cache = model.run_with_cache(tokens, names_filter=names)
            parts.append(torch.cat([cache[name][:, -1] for name in names], dim=-1))
    return torch.cat(parts)


def _short(values: Tensor) -> list[float]:
    """Numbers with three significant digits, so that a report of many runs stays small."""
    return [float(f"{value:.3g}") for value in values.tolist()]
