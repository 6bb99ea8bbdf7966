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


def columns(*, seed: int = 0, n: int = 50) -> Reference:
    """Return a network that adds units and tens in columns and carries: right on the full table.

    The embedding of 10 t + u is the indicator of u and that of t; uniform attention counts them for both operands.
    From the counts, U = the sum of the units and T = the sum of the tens are linear. Neurons are relu(U - v) for v
    from -1 to 19, relu(T), and relu(U - 9) and relu(U - 10) once more. Second differences of the first give the
    indicator of U modulo 10, the difference of the last two the carry k = [U >= 10]. The logit of c = 10 d + e is
    10 [e = U mod 10] + 5 (2 d (T + k) - d^2), which is largest at e = U mod 10 and d = T + k.

    A planted positive for the column algorithm: units digit, tens digit and carry can each be exchanged alone, and the
    answer follows. A negative for Fourier and number-line algorithms; its neurons are indicators of digit sums, so it
    is the adversary of tests that take such neurons for heuristics.

    Args:
        seed: draws the directions and the order of the neurons (the algorithm has no random part).
        n: number of operand values, 11 to 100.

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
    # What the MLP writes: ten indicators of the units digit, then T, then the carry. T and d count from the middle of
    # their range, which changes all logits alike and keeps them small.
    middle = tens - 0.5
    w_out = torch.block_diag(
        units_indicators(), torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    )
    b_out = torch.zeros(12, dtype=torch.float64)
    b_out[10] = -middle
    answers = task.answer_values
    d, e = (answers // 10).double() - middle, one_hot(answers % 10, 10)
    readout = torch.cat([UNITS_GAIN * e.T, TENS_GAIN * 2 * d.expand(2, -1)])
    mechanism = Mechanism(code, "sum", (Neurons(w_in, b_in, w_out, b_out),), readout, bias=-TENS_GAIN * d.square())
    model = wire(task, mechanism, generator=torch.Generator().manual_seed(seed))
    return Reference(model, task, "algorithm/columns")


def units_indicators() -> Float[Tensor, "21 10"]:
    """Return the weights that turn relu(U - v), v = -1 to 19, into the indicators of U mod 10, U = 0 to 18.

    The indicator of U = x is relu(U - x + 1) - 2 relu(U - x) + relu(U - x - 1).
    """
    weights = torch.zeros(21, 10, dtype=torch.float64)
    for x in range(19):
        for hinge, weight in ((x - 1, 1.0), (x, -2.0), (x + 1, 1.0)):
            weights[hinge + 1, x % 10] += weight
    return weights
