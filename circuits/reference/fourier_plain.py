"""Addition without wrapping round, by Fourier features of a circle that is long enough."""

from __future__ import annotations

import math

import torch

from circuits.reference.fourier_pizza import GAIN, check_phases, circles, draw_frequencies
from circuits.reference.wiring import Mechanism, Neurons, Reference, require_exact, wire
from circuits.tasks import Addition


def fourier_plain(*, seed: int = 0, n: int = 50, frequencies: int = 10, phases: int = 7) -> Reference:
    """Return a network that adds by the pizza algorithm on a circle of all 2n - 1 results: right on the full table.

    As ``fourier-pizza`` with the modulus 2n - 1, so that no sum wraps round.

    A planted positive for a Fourier algorithm on a task that is not modular, where low frequencies look like hinges; a
    negative for number lines and for every heuristic.

    Args:
        seed: draws the frequencies, their first phases, and the directions.
        n: number of operand values.
        frequencies: how many.
        phases: neurons for each frequency, an odd number from 5 on.

    Raises:
        BadInput: a size is out of range, or so few frequencies and phases give an inexact table.

    Source: Zhong et al. 2023 (arXiv 2306.17844), section 3, on a line; addition in language models by Fourier features
        without a modulus: Zhou et al. 2024 (arXiv 2406.03445).
    """
    task = Addition(n=n, block=min(10, n // 5))
    check_phases(phases)
    results = len(task.answer_values)
    generator = torch.Generator().manual_seed(seed)
    chosen = draw_frequencies(results, frequencies, generator)
    first = 2 * math.pi * torch.rand(frequencies, generator=generator, dtype=torch.float64)
    phase = first[:, None] + 2 * math.pi / phases * torch.arange(phases)
    w_in = torch.block_diag(*torch.stack([phase.cos(), phase.sin()], dim=1))
    w_out = torch.block_diag(*torch.stack([(2 * phase).cos(), (2 * phase).sin()], dim=2))
    code = circles(results, chosen)
    mlp = Neurons(w_in, torch.zeros(w_in.shape[1], dtype=torch.float64), w_out * 3 * math.pi / (2 * phases))
    mechanism = Mechanism(code[:n], "sum", (mlp,), GAIN / frequencies * code.T)
    model = wire(task, mechanism, generator=generator)
    require_exact(model, task, "use more frequencies or phases")
    return Reference(model, task, "algorithm/fourier")
