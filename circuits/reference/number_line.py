"""Addition of magnitudes along one direction."""

from __future__ import annotations

import torch

from circuits.reference.wiring import Mechanism, Neurons, Reference, require_exact, wire
from circuits.tasks import Addition
from circuits.tasks.arithmetic.operand_square import check_integer, check_share


def number_line(*, seed: int = 0, n: int = 50, thresholds: int = 6, spread: float = 0.1) -> Reference:
    """Return a network that adds numbers as lengths on one direction: right on the full table.

    The embedding of x is x - (n - 1) / 2 times one direction, and uniform attention gives z = a + b - (n - 1). For each
    of some thresholds t one neuron is relu(z - t) and one is relu(t - z). Their difference is z - t, so that weights
    v_t > 0 that sum to one give z = sum_t v_t (relu(z - t) - relu(t - z) + t). With y = c - (n - 1) the logit of c is
    2 y z - y^2 = z^2 - (y - z)^2: largest at c = a + b.

    A planted positive for a number-line algorithm (one direction carries the operand, neurons are hinges); a negative
    for Fourier and column algorithms and for ranges, and the adversary of tests that take low frequencies for hinges.
    With a small ``spread`` nearly all inputs are served by the same half of the neurons. With a spread of 1 small and
    large sums are served by different ones, and with many thresholds no single neuron is needed to answer one slice of
    the inputs: tests of whether slices share neurons then speak against an algorithm, although it is the same one.
    The readout is exact but fine: at n = 50 neighbouring answers differ by 1 in logits of up to 2,400, and weight noise
    of 0.1 % costs a tenth of the answers.

    Args:
        seed: draws the thresholds, their weights and the directions.
        n: number of operand values.
        thresholds: how many; each has two neurons.
        spread: the share of the range of sums, from its lower end, that thresholds are drawn from.

    Raises:
        BadInput: a size is out of range.

    Source: one direction that carries magnitude, with rectified thresholds: the construction is ours; linear number
        codes in language models: Kantamneni & Tegmark 2025 (arXiv 2502.00873), section 4.
    """
    task = Addition(n=n, block=min(10, n // 5))
    check_integer("thresholds", thresholds, 1, 4096)
    check_share("spread", spread, zero=True, one=True)
    generator = torch.Generator().manual_seed(seed)
    t = 1 - n + spread * (2 * n - 2) * torch.rand(thresholds, generator=generator, dtype=torch.float64)
    v = 0.5 + torch.rand(thresholds, generator=generator, dtype=torch.float64)
    v = v / v.sum()
    ones = torch.ones_like(t)
    mlp = Neurons(
        torch.cat([ones, -ones])[None, :], torch.cat([-t, t]), torch.cat([v, -v])[:, None], b_out=(v * t).sum()[None]
    )
    x, y = torch.arange(n).double(), task.answer_values.double() - (n - 1)
    mechanism = Mechanism((x - x.mean())[:, None], "sum", (mlp,), 2 * y[None, :], bias=-y.square())
    model = wire(task, mechanism, generator=generator)
    require_exact(model, task, "float32 rounds too coarsely here; use fewer operand values")
    return Reference(model, task, "algorithm/number-line")
