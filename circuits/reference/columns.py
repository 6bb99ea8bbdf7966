"""Addition of one-token numbers digit by digit, with a carry."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.reference.wiring import Mechanism, Neurons, Reference, one_hot, wire
from circuits.tasks import Addition
from circuits.tasks.arithmetic.operand_square import check_integer

UNITS_GAIN = 10.0
TENS_GAIN = 5.0
STEP = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
"""Of two hinges at x - 1 and x, the step [s >= x]."""


def columns(*, seed: int = 0, n: int = 50, cascade: bool = True) -> Reference:
    """Return a network that adds units and tens in columns and carries: right on the full table with ``cascade``.

    The embedding of 10 t + u is the indicator of u and that of t; uniform attention counts them for both operands.
    From the counts, U = the sum of the units and T = the sum of the tens are linear. Neurons are relu(U - v) for v
    from -1 to 19, relu(T), and relu(U - 9) and relu(U - 10) once more. Second differences of the first give the
    indicator of U modulo 10, the difference of the last two the carry k = [U >= 10]. The logit of c = 10 d + e is
    10 [e = U mod 10] + 5 (2 d (T + k) - d^2), which is largest at e = U mod 10 and d = T + k.

    Without ``cascade`` each digit of the result is made by itself, in two layers: the tens digit is (T + k) mod 10, and
    the hundreds are [T >= 10], for which the carry comes too late. All sums are right but those whose tens add to nine
    and take a carry, which lack a hundred: none up to n = 50, 2.5 % at n = 60, 4.5 % at n = 100.

    A planted positive for the column algorithm: units digit, tens digit and carry can each be exchanged alone, and the
    answer follows. A negative for Fourier and number-line algorithms; its neurons are indicators of digit sums, so it
    is the adversary of tests that take such neurons for heuristics.

    Args:
        seed: draws the directions and the order of the neurons (the algorithm has no random part).
        n: number of operand values, 11 to 100.
        cascade: whether the carry out of the units reaches the hundreds.

    Raises:
        BadInput: n is out of range.

    Source: sub-tasks base add and carry: Quirke & Barez 2024 (arXiv 2310.13121), section 3; the weights are ours.
    """
    check_integer("n", n, 11, 100, "a number has one or two digits here")
    task = Addition(n=n, block=min(10, n // 5))
    values = torch.arange(n)
    tens = (n + 9) // 10
    code = torch.cat([one_hot(values % 10, 10), one_hot(values // 10, tens)], dim=1)
    units_sum = torch.cat([torch.arange(10), torch.zeros(tens)]).double()[:, None]
    tens_sum = torch.cat([torch.zeros(10), torch.arange(tens)]).double()[:, None]
    v = torch.arange(-1, 20).double()
    carry = torch.tensor([9.0, 10.0], dtype=torch.float64)
    w_in = torch.cat([units_sum.expand(-1, len(v)), tens_sum, units_sum.expand(-1, 2)], dim=1)
    b_in = torch.cat([-v, torch.zeros(1), -carry])
    # What the MLP writes: ten indicators of the units digit, then T, then the carry.
    w_out = torch.block_diag(units_indicators(), torch.ones(1, 1, dtype=torch.float64), STEP)
    columns_of = Neurons(w_in, b_in, w_out)
    answers = task.answer_values
    generator = torch.Generator().manual_seed(seed)
    if not cascade:
        digits = [one_hot(d, 10) for d in (answers % 10, answers // 10 % 10, answers // 100)]
        readout = UNITS_GAIN * torch.cat([digits[0], digits[1], digits[2][:, 1:2] - digits[2][:, :1]], dim=1).T
        # The step for the hundreds is 0 or 1: one half of it is what tells them apart.
        bias = -UNITS_GAIN * (digits[2][:, 1] - digits[2][:, 0]) / 2
        mechanism = Mechanism(code, "sum", (columns_of, _digits_apart()), readout, bias=bias)
        return Reference(wire(task, mechanism, generator=generator), task, "algorithm/columns")
    # T and d count from the middle of their range, which changes all logits alike and keeps them small.
    middle = tens - 0.5
    b_out = torch.zeros(12, dtype=torch.float64)
    b_out[10] = -middle
    d, e = (answers // 10).double() - middle, one_hot(answers % 10, 10)
    readout = torch.cat([UNITS_GAIN * e.T, TENS_GAIN * 2 * d.expand(2, -1)])
    first = Neurons(w_in, b_in, w_out, b_out)
    mechanism = Mechanism(code, "sum", (first,), readout, bias=-TENS_GAIN * d.square())
    return Reference(wire(task, mechanism, generator=generator), task, "algorithm/columns")


def _digits_apart() -> Neurons:
    """Return the layer that reads units, T and carry, and writes units digit, tens digit and [T >= 10]."""
    v = torch.arange(-1, 20).double()
    ten = torch.tensor([9.0, 10.0], dtype=torch.float64)
    w_in = torch.zeros(12, 10 + len(v) + 2, dtype=torch.float64)
    w_in[:10, :10].fill_diagonal_(1.0)
    w_in[10, 10:] = 1.0  # T
    w_in[11, 10 : 10 + len(v)] = 1.0  # the carry, for the tens digit alone
    b_in = torch.cat([torch.zeros(10, dtype=torch.float64), -v, -ten])
    return Neurons(w_in, b_in, torch.block_diag(torch.eye(10, dtype=torch.float64), tens_indicators(), STEP))


def tens_indicators() -> Float[Tensor, "21 10"]:
    """Return the weights that turn relu(s - v), v = -1 to 19, into the indicators of s mod 10, s = 0 to 19."""
    weights = units_indicators()
    # s = 19 needs relu(s - 20), which is zero: the second difference is that of the last two hinges.
    for hinge, weight in ((18, 1.0), (19, -2.0)):
        weights[hinge + 1, 9] += weight
    return weights


def units_indicators() -> Float[Tensor, "21 10"]:
    """Return the weights that turn relu(U - v), v = -1 to 19, into the indicators of U mod 10, U = 0 to 18.

    The indicator of U = x is relu(U - x + 1) - 2 relu(U - x) + relu(U - x - 1).
    """
    weights = torch.zeros(21, 10, dtype=torch.float64)
    for x in range(19):
        for hinge, weight in ((x - 1, 1.0), (x, -2.0), (x + 1, 1.0)):
            weights[hinge + 1, x % 10] += weight
    return weights
