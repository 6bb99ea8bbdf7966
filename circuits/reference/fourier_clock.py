"""Modular addition by products of Fourier features of the two operands (the clock algorithm)."""

from __future__ import annotations

import math

import torch

from circuits.reference.fourier_pizza import GAIN, check_phases, circles, draw_frequencies
from circuits.reference.wiring import Mechanism, Neurons, Reference, require_exact, wire
from circuits.tasks import ModularAddition


def fourier_clock(*, seed: int = 0, p: int = 53, frequencies: int = 6, phases: int = 5) -> Reference:
    """Return a network that adds modulo p by the clock algorithm: right on the full table.

    Operands are embedded as cos wx, sin wx for each w = 2 pi k / p; one head attends to each operand, so that the MLP
    sees them side by side. For every pair of phases f, g out of J evenly spaced ones there is a neuron
    relu(cos(wa - f) + cos(wb - g)), and, as the coefficient of relu(cos x + cos y) at exp(i(x + y)) is 4 / 3 pi^2,

        sum_fg relu(cos(wa - f) + cos(wb - g)) exp(i(f + g)) = (4 J^2 / 3 pi^2) exp(i w(a+b))

    up to harmonics that J phases alias (5 % for J = 5, 2 % for 7): the products cos wa cos wb - sin wa sin wb and
    sin wa cos wb + cos wa sin wb. The logit of c is sum_k cos w_k(a+b-c).

    A planted positive for a Fourier algorithm; a negative for every heuristic. Sub-label clock: its logits do not
    depend on a - b.

    Args:
        seed: draws the frequencies, their first phases, and the directions.
        p: the prime modulus.
        frequencies: how many.
        phases: per operand; each frequency has phases**2 neurons. An odd number from 5 on.

    Raises:
        BadInput: a size is out of range, or so few frequencies and phases give an inexact table.

    Source: Nanda et al. 2023 (arXiv 2301.05217), section 4; Zhong et al. 2023 (arXiv 2306.17844), section 2 (clock).
    """
    task = ModularAddition(p=p)
    check_phases(phases)
    generator = torch.Generator().manual_seed(seed)
    chosen = draw_frequencies(p, frequencies, generator)
    first = 2 * math.pi * torch.rand(2, frequencies, generator=generator, dtype=torch.float64)
    steps = 2 * math.pi / phases * torch.cartesian_prod(torch.arange(phases), torch.arange(phases)).T
    left, right = first[:, :, None] + steps[:, None, :]
    # One block of the matrices for each frequency: its two features of an operand, J^2 neurons, two outputs.
    halves = [torch.block_diag(*torch.stack([f.cos(), f.sin()], dim=1)) for f in (left, right)]
    both = left + right
    w_out = torch.block_diag(*torch.stack([both.cos(), both.sin()], dim=2))
    w_in = torch.cat(halves)
    scale = 3 * math.pi**2 / (4 * phases**2)
    mlp = Neurons(w_in, torch.zeros(w_in.shape[1], dtype=torch.float64), w_out * scale)
    code = circles(p, chosen)
    mechanism = Mechanism(code, "apart", (mlp,), GAIN / frequencies * code.T)
    model = wire(task, mechanism, generator=generator)
    require_exact(model, task, "use more frequencies or phases")
    return Reference(model, task, "algorithm/fourier")
