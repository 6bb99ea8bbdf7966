"""What tests of reference models share: accuracy against the true sums, and each neuron's map."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.reference import Reference
from circuits.reference.wiring import table


def answered(model: Any, task: Any, operands: Tensor | None = None) -> Bool[Tensor, " pairs"]:
    """Which pairs are right, as an argmax over all tokens; the truth is computed here, not by the task."""
    operands = table(task) if operands is None else operands
    total = operands.sum(1)
    truth = total % task.period if task.period else total
    with torch.no_grad():
        said = model(task.encode(operands).inputs)[:, -1].argmax(-1)
    return said == truth


def accuracy(built: Reference, operands: Tensor | None = None) -> float:
    return float(answered(built.model, built.task, operands).float().mean())


def neuron_maps(built: Reference, layer: int = 0) -> Float[Tensor, "neurons n n"]:
    """Activation of each neuron at the last position over the operand square."""
    n, name = built.task.n_operand_values, f"blocks.{layer}.mlp.hook_post"
    with torch.no_grad():
        _, cache = built.model.run_with_cache(built.task.encode(table(built.task)).inputs, names_filter=name)
    return cache[name][:, -1].T.reshape(-1, n, n).double()
