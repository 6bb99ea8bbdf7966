"""Modular addition by Fourier features that are added up and rectified (the pizza algorithm)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.reference.wiring import Mechanism, Neurons, Reference, require_exact, wire
from circuits.tasks import ModularAddition
from circuits.tasks.arithmetic.operand_square import check_integer

GAIN = 20.0


def draw_frequencies(p: int, frequencies: int, generator: torch.Generator) -> Int[Tensor, " frequencies"]:
    """Return distinct frequencies below p / 2, drawn without replacement.

    Raises:
        BadInput: there are not so many.
    """
    check_integer("frequencies", frequencies, 1, (p - 1) // 2, f"there are (p - 1) / 2 of them for p = {p}")
    return 1 + torch.randperm((p - 1) // 2, generator=generator)[:frequencies]


def circles(p: int, frequencies: Int[Tensor, " k"]) -> Float[Tensor, "p 2*k"]:
    """Return cos and sin of 2 pi k x / p for every x: two columns for each frequency k."""
    angles = 2 * math.pi / p * torch.arange(p, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=2).flatten(1)


def check_phases(phases: int) -> None:
    """Return nothing.

    Raises:
        BadInput: ``phases`` is no odd number from 5 on (even numbers and 3 alias the wanted harmonic).
    """
    check_integer("phases", phases, 5, 99)
    if phases % 2 == 0:
        raise BadInput(f"phases = {phases}: expected an odd number, because even ones alias; try {phases + 1}")


def fourier_pizza(*, seed: int = 0, p: int = 53, frequencies: int = 6, phases: int = 7) -> Reference:
    """Return a network that adds modulo p by the pizza algorithm: right on the full table.

    Operands are embedded as cos wx, sin wx for each w = 2 pi k / p, and uniform attention adds them up, which gives
    2 cos(w(a-b)/2) (cos, sin)(w(a+b)/2). Neuron (k, j) with phase f_j = f_0 + 2 pi j / J is

        relu(cos(wa - f_j) + cos(wb - f_j)) = relu(2 cos(w(a-b)/2) cos(w(a+b)/2 - f_j)),

    and ``sum_j relu(...) exp(2 i f_j) = (2J / 3 pi) |cos(w(a-b)/2)| exp(i w(a+b))`` up to harmonics that J phases
    alias (2 % for J = 7). So the logit of c is ``sum_k |cos(w_k(a-b)/2)| cos w_k(a+b-c)``: largest at a + b modulo p.

    A planted positive for a Fourier algorithm (logits and neurons of single frequencies, all pairs alike); a negative
    for every heuristic. Sub-label pizza: its logits depend on a - b.

    Args:
        seed: draws the frequencies, their first phases, and the directions.
        p: the prime modulus.
        frequencies: how many.
        phases: neurons for each frequency, an odd number from 5 on.

    Raises:
        BadInput: a size is out of range, or so few frequencies and phases give an inexact table.

    Source: Zhong et al. 2023 (arXiv 2306.17844), section 3 (pizza); Nanda et al. 2023 (arXiv 2301.05217), section 4.
    """
    task = ModularAddition(p=p)
    check_phases(phases)
    generator = torch.Generator().manual_seed(seed)
    chosen = draw_frequencies(p, frequencies, generator)
    first = 2 * math.pi * torch.rand(frequencies, generator=generator, dtype=torch.float64)
    phase = first[:, None] + 2 * math.pi / phases * torch.arange(phases)
    # One block of the matrices for each frequency: its two features, its J neurons, its two outputs.
    w_in = torch.block_diag(*torch.stack([phase.cos(), phase.sin()], dim=1))
    w_out = torch.block_diag(*torch.stack([(2 * phase).cos(), (2 * phase).sin()], dim=2))
    code = circles(p, chosen)
    mlp = Neurons(w_in, torch.zeros(w_in.shape[1], dtype=torch.float64), w_out * 3 * math.pi / (2 * phases))
    mechanism = Mechanism(code, "sum", (mlp,), GAIN / frequencies * code.T)
    model = wire(task, mechanism, generator=generator)
    require_exact(model, task, "use more frequencies or phases")
    return Reference(model, task, "algorithm/fourier")
