"""Addition by a vote of operand ranges: which results do numbers of these two ranges have?"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.reference.wiring import Mechanism, Neurons, Reference, conjunctions, one_hot, table, wire
from circuits.tasks import Addition
from circuits.tasks.arithmetic.operand_square import check_integer

IMPOSSIBLE = 1e-4
"""Probability that a cell gives a result that none of its pairs has."""

PREFERENCE = 0.01
"""How much less a cell votes for a result than for the next smaller one: settles ties."""


def range_index(n: int, width: int, offset: int) -> Int[Tensor, " n"]:
    """Return the number of the range that each operand value lies in, for ranges that begin at offset + i width."""
    index = torch.div(torch.arange(n) - offset, width, rounding_mode="floor")
    return index - index.min()


def grid_offsets(grids: int, width: int, offset: int) -> list[int]:
    """Return where the ranges of each grid begin: ``offset`` moved on by equal parts of the width."""
    return [(offset + round(i * width / grids)) % width for i in range(grids)]


def cell_votes(
    index: Int[Tensor, " n"], sums: Int[Tensor, " pairs"], results: int
) -> tuple[Int[Tensor, "cells 2"], Float[Tensor, "cells results"], float]:
    """Return the cells of a grid, how each votes, and by how much its votes for possible results differ at most.

    A cell votes log P(result | a in R, b in R') over uniform pairs, from log ``IMPOSSIBLE`` (no vote) upwards.
    """
    ranges = int(index.max()) + 1
    cell = (index[:, None] * ranges + index[None, :]).flatten()
    counts = torch.zeros(ranges * ranges, results, dtype=torch.float64)
    counts.index_put_((cell, sums), torch.ones(1, dtype=torch.float64), accumulate=True)
    shares = counts / counts.sum(1, keepdim=True)
    votes = torch.log(shares.clamp_min(IMPOSSIBLE) / IMPOSSIBLE)
    possible = counts > 0
    rank = torch.arange(results) - possible.int().argmax(1, keepdim=True)
    votes = torch.where(possible, votes - PREFERENCE * rank, votes)
    most = votes.masked_fill(~possible, -torch.inf).amax(1)
    least = votes.masked_fill(~possible, torch.inf).amin(1)
    cells = torch.cartesian_prod(torch.arange(ranges), torch.arange(ranges))
    return cells, votes, float((most - least).max())


def range_lookup(*, seed: int = 0, n: int = 50, grids: int = 4, width: int = 10, offset: int = 0) -> Reference:
    """Return a network that adds by matching ranges of the operands, the units digit by a table of digit pairs.

    A neuron for each cell of a grid is relu(2 [a in R] + 2 [b in R'] - 3), on inside its rectangle and off outside,
    and votes log P(a + b = c | a in R, b in R') for each result c. Further grids have their ranges shifted by
    width / grids. A neuron for each pair of units digits votes for the results with the right units digit. Ranges of
    ten and units digits leave a doubt of ten at the borders of cells: one grid is right on 75 % of the pairs (each
    cell answers the more frequent of two results), two on 99 %, three or more on all, at n = 50, width 10. Every error
    of one grid is plus or minus ten.

    A planted positive for range matching: rectangles carry most of the importance, replacing them by exact rectangles
    changes nothing, edges lie on the grids, and each slice of the inputs has its own neurons. A negative for Fourier,
    column and number-line algorithms.

    Args:
        seed: draws the directions and the order of the neurons (the vote has no random part).
        n: number of operand values.
        grids: how many shifted grids vote.
        width: width of the ranges.
        offset: where the first grid's ranges begin; moves every edge.

    Raises:
        BadInput: a size is out of range.

    Source: operand ranges as heuristics: Nikankin et al. 2025 (arXiv 2410.21272), section 4 and appendix E; the vote
        of grids is ours.
    """
    check_integer("width", width, 2, n, f"there are {n} operand values")
    check_integer("grids", grids, 1, width, "grids are shifted by whole numbers")
    check_integer("offset", offset, 0, width - 1)
    task = Addition(n=n, block=min(10, n // 5))
    sums, results = table(task).sum(1), len(task.answer_values)
    features, lefts, rights, votes, doubt = [], [], [], [], 0.0
    for begin in grid_offsets(grids, width, offset):
        index = range_index(n, width, begin)
        cells, cast, difference = cell_votes(index, sums, results)
        features.append(one_hot(index, int(index.max()) + 1))
        lefts.append(one_hot(cells[:, 0], features[-1].shape[1]).bool())
        rights.append(one_hot(cells[:, 1], features[-1].shape[1]).bool())
        votes.append(cast)
        doubt += difference
    digits = torch.cartesian_prod(torch.arange(10), torch.arange(10))
    features.append(one_hot(torch.arange(n) % 10, 10))
    lefts.append(one_hot(digits[:, 0], 10).bool())
    rights.append(one_hot(digits[:, 1], 10).bool())
    # Enough for the right units digit to overrule every preference that the grids have among possible results.
    votes.append((doubt + 1) * (torch.arange(results) % 10 == digits.sum(1, keepdim=True) % 10).double())
    w_in, b_in = conjunctions(torch.block_diag(*lefts).bool(), torch.block_diag(*rights).bool())
    mechanism = Mechanism(
        torch.cat(features, dim=1),
        "apart",
        (Neurons(w_in, b_in, torch.cat(votes)),),
        torch.eye(results, dtype=torch.float64),
    )
    model = wire(task, mechanism, generator=torch.Generator().manual_seed(seed))
    return Reference(model, task, "heuristics/range-lookup")
