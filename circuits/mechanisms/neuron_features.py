"""What neurons are fitted by: waves of one frequency, hinges, and indicators of ranges, residues and digits."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.mechanisms.heuristics import MODULI
from circuits.mechanisms.least_squares import block_fits
from circuits.tasks.base import Task


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
    """Indicators: x >= t, x in a decade, residues modulo ``MODULI``, cells of decades, digit sums, the units' carry.

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
        for m in MODULI:
            columns.append((x % m)[:, None] == torch.arange(m, device=a.device)[None, :])
    decades = torch.arange((n + 9) // 10, device=a.device)
    cells = ((a // 10)[:, None] == decades)[:, :, None] & ((b // 10)[:, None] == decades)[:, None, :]
    units = a % 10 + b % 10
    tens = a // 10 + b // 10
    columns += [cells.flatten(1), units[:, None] == torch.arange(19, device=a.device)]
    columns.append(tens[:, None] == torch.arange(2 * len(decades) - 1, device=a.device))
    columns += [(units >= 10)[:, None], (a == b)[:, None]]
    return torch.cat([c.float() for c in columns], dim=1)
