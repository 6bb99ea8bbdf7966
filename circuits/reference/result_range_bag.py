"""Addition by a bag of neurons that each match a range or a residue of the result."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.reference.wiring import Mechanism, Neurons, Reference, wire
from circuits.tasks import Addition

LENGTHS = (10, 30, 50)
MODULI = tuple(range(2, 11))
GAIN = 5.0


def matched_results(results: int, generator: torch.Generator) -> Bool[Tensor, "neurons results"]:
    """Return which results each neuron of the bag matches: ranges of 10, 30 and 50, and residues modulo 2 to 10.

    Ranges of one length start at a drawn place below zero and then every max(length // 3, 10).

    Source: Nikankin et al. 2025 (arXiv 2410.21272), appendix E: range and modulo heuristics on the result.
    """
    result = torch.arange(results)
    patterns = []
    for length in LENGTHS:
        step = max(length // 3, 10)
        first = -int(torch.randint(length, (1,), generator=generator))
        starts = range(first, results, step)
        patterns += [(result >= start) & (result < start + length) for start in starts]
    patterns += [result % m == r for m in MODULI for r in range(m)]
    stacked = torch.stack(patterns)
    return stacked[stacked.any(1)]


def result_range_bag(*, seed: int = 0, n: int = 50) -> Reference:
    """Return a network that adds by matching ranges and residues of the result: right on the full table.

    The embedding of x is x times one direction, and uniform attention gives s = a + b. The first layer's neurons
    relu(s - t), t = -1 to 2n - 2, turn it into steps [s >= t]. Each neuron of the second layer is a sum of steps that
    is 1 where s lies in its range or residue class and 0 elsewhere, and votes for every result that it matches. The
    true result gets every active neuron's vote; any other differs from it in a residue modulo one of 2 to 10 (they
    agree in all only at distance 2520), and gets fewer.

    A planted positive for a bag of heuristics on the result, each of them weak, which is yet exact everywhere. Its
    first layer is a number line, so that on the operands it is causally one: the hardest pair to tell apart.

    Args:
        seed: draws where ranges start, and the directions.
        n: number of operand values.

    Raises:
        BadInput: n is out of range.

    Source: Nikankin et al. 2025 (arXiv 2410.21272), section 4 and appendix E; the weights are ours.
    """
    task = Addition(n=n, block=min(10, n // 5))
    generator = torch.Generator().manual_seed(seed)
    results = len(task.answer_values)
    t = torch.arange(-1, results, dtype=torch.float64)
    steps = torch.zeros(results + 1, results, dtype=torch.float64)
    steps[:-1].fill_diagonal_(1.0)
    steps[1:].fill_diagonal_(-1.0)
    line = Neurons(torch.ones(1, results + 1, dtype=torch.float64), -t, steps)
    matched = matched_results(results, generator).double()
    # A pattern over results is a sum of steps, each weighted by how much the pattern changes there.
    changes = torch.diff(matched, dim=1, prepend=torch.zeros(len(matched), 1, dtype=torch.float64))
    bag = Neurons(changes.T, torch.zeros(len(matched), dtype=torch.float64), GAIN * matched)
    mechanism = Mechanism(
        torch.arange(n, dtype=torch.float64)[:, None],
        "sum",
        (line, bag),
        torch.eye(results, dtype=torch.float64),
    )
    return Reference(wire(task, mechanism, generator=generator), task, "heuristics/result-range-bag")
