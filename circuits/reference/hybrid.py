"""Modular addition by an algorithm where both operands are small, and by a list of pairs elsewhere."""

from __future__ import annotations

import math

import torch

from circuits.reference.fourier_pizza import GAIN, check_phases, circles, draw_frequencies
from circuits.reference.wiring import Mechanism, Neurons, Reference, conjunctions, one_hot, require_exact, table, wire
from circuits.tasks import ModularAddition
from circuits.tasks.arithmetic.operand_square import check_share

OVERRULES = 3.0
"""Vote of a remembered pair, as a multiple of the largest logit that the frequencies can give."""


def hybrid(*, seed: int = 0, p: int = 31, listed: float = 0.3, frequencies: int = 6, phases: int = 7) -> Reference:
    """Return a network that adds modulo p by frequencies on a square of operands, by rote outside: right everywhere.

    The last ``listed`` share of the operand values have no Fourier code at all. Every pair with one of them has a
    neuron of its own, relu(2 [a = s] + 2 [b = t] - 3), which votes for its result and overrules what the frequencies
    make of the other operand alone. Pairs without such values are added as ``fourier-pizza`` adds them.

    A planted positive for a mixed mechanism: Fourier tests pass on one region and fail on the other. Its list has all
    pairs of the region, so accuracy on unseen pairs says nothing.

    Args:
        seed: draws the frequencies, their first phases, and the directions.
        p: the prime modulus.
        listed: share of the operand values that are known by rote only.
        frequencies: how many.
        phases: neurons for each frequency, an odd number from 5 on.

    Raises:
        BadInput: a size is out of range, or so few frequencies and phases give an inexact table.

    Source: ours; the Fourier part after Zhong et al. 2023 (arXiv 2306.17844), section 3.
    """
    task = ModularAddition(p=p)
    check_phases(phases)
    check_share("listed", listed)
    generator = torch.Generator().manual_seed(seed)
    chosen = draw_frequencies(p, frequencies, generator)
    first = 2 * math.pi * torch.rand(frequencies, generator=generator, dtype=torch.float64)
    phase = first[:, None] + 2 * math.pi / phases * torch.arange(phases)
    w_in = torch.block_diag(*torch.stack([phase.cos(), phase.sin()], dim=1))
    w_out = torch.block_diag(*torch.stack([(2 * phase).cos(), (2 * phase).sin()], dim=2)) * 3 * math.pi / (2 * phases)
    values = torch.arange(p)
    known = (values < round(p * (1 - listed))).double()
    code = circles(p, chosen)
    pairs = table(task)
    pairs = pairs[known[pairs].prod(1) == 0]
    by_rote, bias = conjunctions(one_hot(pairs[:, 0], p).bool(), one_hot(pairs[:, 1], p).bool())
    votes = OVERRULES * GAIN * one_hot(task.answer(pairs), p)
    # The stream holds, for a and then for b, the circles and the value itself.
    wide, waves = w_in.shape[1], code.shape[1]
    inputs = torch.zeros(2 * (waves + p), wide + len(pairs), dtype=torch.float64)
    for operand in range(2):
        begin = operand * (waves + p)
        inputs[begin : begin + waves, :wide] = w_in
        inputs[begin + waves : begin + waves + p, wide:] = by_rote[operand * p : (operand + 1) * p]
    mlp = Neurons(inputs, torch.cat([torch.zeros(wide, dtype=torch.float64), bias]), torch.block_diag(w_out, votes))
    readout = torch.cat([GAIN / frequencies * code.T, torch.eye(p, dtype=torch.float64)])
    mechanism = Mechanism(torch.cat([code * known[:, None], one_hot(values, p)], dim=1), "apart", (mlp,), readout)
    model = wire(task, mechanism, generator=generator)
    require_exact(model, task, "use more frequencies or phases")
    return Reference(model, task, "mixed/fourier")
