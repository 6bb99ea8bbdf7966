"""Rules that describe neurons: waves, hinges, indicators and digits as regressors, and conjunctions of sets."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.mechanisms.groups import angle, group_index
from circuits.mechanisms.heuristics import MODULI
from circuits.mechanisms.neuron_features import hinge_features, indicator_features, lowest_frequency
from circuits.tasks.base import Task


def wave_columns(task: Task, operands: Int[Tensor, "rows 2"]) -> Float[Tensor, "rows features"]:
    """{1, cos wa, sin wa} x {1, cos wb, sin wb} without the constant, eight columns for each frequency."""
    renamed = group_index(task, operands)
    assert renamed is not None  # every one-token task has a renaming
    a, b, kept, modulus = renamed
    frequencies = torch.arange(lowest_frequency(task, modulus), modulus // 2 + 1, device=a.device)
    wa = angle(a[:, None] * frequencies, 1, modulus)
    wb = angle(b[:, None] * frequencies, 1, modulus)
    one = torch.ones_like(wa)
    left, right = (one, wa.cos(), wa.sin()), (one, wb.cos(), wb.sin())
    products = [x * y for x in left for y in right][1:]
    return torch.stack(products, dim=2).flatten(1) * kept[:, None]


def hinge_columns(task: Task, operands: Int[Tensor, "rows 2"]) -> Float[Tensor, "rows features"]:
    """Hinges of a, b, a + b and a - b, by ``hinge_features``."""
    return hinge_features(operands, task.n_operand_values)


def indicator_columns(task: Task, operands: Int[Tensor, "rows 2"]) -> Float[Tensor, "rows features"]:
    """Indicators of ranges, residues, digits and cells, by ``indicator_features``."""
    return indicator_features(operands, task.n_operand_values)


def digit_columns(task: Task, operands: Int[Tensor, "rows 2"]) -> Float[Tensor, "rows features"]:
    """Hinges and single values of the units and the tens of a and of b, and of their sums in a column."""
    a, b = operands.T
    columns = []
    for x, y in ((a % 10, b % 10), (a // 10, b // 10)):
        for value in (x, y, x + y):
            at = torch.arange(int(value.max()) + 1, device=value.device)
            apart = (value[:, None] - at).float()
            columns += [apart.relu(), (-apart).relu(), (apart == 0).float()]
    return torch.cat(columns, dim=1)


COLUMNS: dict[str, Callable[[Task, Tensor], Tensor]] = {
    "frequencies": wave_columns,
    "hinges": hinge_columns,
    "indicators": indicator_columns,
    "digits": digit_columns,
}
"""Families whose rules are regressors, by what makes them."""


def marginal_sets(
    maps: Float[Tensor, "neurons n n"],
) -> tuple[Bool[Tensor, "neurons n"], Bool[Tensor, "neurons n"]]:
    """For each neuron the values of a and of b where it is high (low, if it is high nearly everywhere), by marginals.

    A value is in the set if the neuron is high there in more than half as many places as at its fullest value.
    """
    high = maps > (maps.amax((1, 2), keepdim=True) + maps.amin((1, 2), keepdim=True)) / 2
    high = torch.where(high.float().mean((1, 2), keepdim=True) > 0.5, ~high, high).float()
    profiles = [high.mean(axis) for axis in (2, 1)]
    first, second = (profile > profile.amax(1, keepdim=True) / 2 for profile in profiles)
    return first, second


def set_bits(sets: Bool[Tensor, "neurons n"]) -> Float[Tensor, " neurons"]:
    """Bits that name each set: of all ranges and residue classes (``MODULI``), or else one bit a value."""
    n = sets.shape[1]
    number = torch.arange(n, device=sets.device)
    classes = torch.stack([number % m == r for m in MODULI for r in range(m)])
    steps = (sets[:, 1:] != sets[:, :-1]).sum(1) + sets[:, 0].int() + sets[:, -1].int()
    regular = (steps <= 2) | (sets[:, None] == classes[None]).all(2).any(1)
    named = math.log2(n * (n + 1) / 2 + len(classes))
    return torch.where(regular, named, float(n)).float()


def conjunctions(
    operands: Int[Tensor, "all 2"], neurons: Float[Tensor, "all n"], rows: Int[Tensor, " some"], size: int, n_fit: int
) -> tuple[Float[Tensor, "some n"], Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Each neuron as two levels, one where a is in a set and b in another, on some rows; its bits; its sets' number.

    ``operands`` are all pairs; the levels are means over the first ``n_fit`` of ``rows``.
    """
    maps = torch.zeros_like(neurons)
    maps[operands[:, 0] * size + operands[:, 1]] = neurons
    first, second = marginal_sets(maps.T.reshape(-1, size, size))
    a, b = operands[rows].T
    inside = (first.T[a] & second.T[b]).to(neurons.dtype)
    fit, values = inside[:n_fit], neurons[rows[:n_fit]]
    high = (values * fit).sum(0) / fit.sum(0).clamp_min(1)
    low = (values * (1 - fit)).sum(0) / (1 - fit).sum(0).clamp_min(1)
    kind = torch.cat([first, second], dim=1).unique(dim=0, return_inverse=True)[1]
    return torch.where(inside > 0, high, low), set_bits(first) + set_bits(second), kind
