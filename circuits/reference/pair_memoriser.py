"""A lookup of trained pairs: one neuron for each."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.reference.wiring import Mechanism, Neurons, Reference, normal, one_hot, wire
from circuits.tasks import Addition, ModularAddition
from circuits.tasks.arithmetic.operand_square import check_integer

MOST_PAIRS = 8000
GAIN = 20.0
GUESS = 0.3
"""Largest spread of the guessed logits, as a share of what a remembered pair adds to its answer."""


def pair_memoriser(
    *,
    seed: int = 0,
    p: int = 53,
    n: int | None = None,
    train_fraction: float = 0.5,
    width: int = 32,
    symmetric: bool = False,
) -> Reference:
    """Return a network that remembers each training pair and knows nothing else: right on train, chance elsewhere.

    Operand values have random unit vectors x of ``width`` dimensions, of coherence r = max x_i . x_j. The neuron of
    the pair (s, t) is relu((x_a . x_s + x_b . x_t - 1 - r) / (1 - r)): 1 on its pair and 0 on every other. It adds to
    the logit of its pair's answer. Pairs without a neuron are answered by a random linear readout of the vectors.
    With ``symmetric`` the values are one-hot and added up by uniform attention, so that (b, a) is known with (a, b),
    as in networks that read both operands through the same weights: right too where the mirror image was trained.

    A planted positive for memorisation; a negative for every algorithm and for ranges. The symmetric one is the
    control for tests that take a known mirror image for generalisation.

    Args:
        seed: draws the vectors, the guesses and the directions.
        p: the prime modulus, where the task is modular addition.
        n: if given, the task is plain addition of numbers below n instead.
        train_fraction: share of the pairs that is remembered.
        width: dimensions of the vectors.
        symmetric: whether pairs are remembered without their order.

    Raises:
        BadInput: a size is out of range, or there are more pairs to remember than 8,000.

    Source: random features that separate all pairs are the textbook lookup; memorisation before grokking:
        Power et al. 2022 (arXiv 2201.02177), section 3.
    """
    check_integer("width", width, 2, 1024)
    task = (
        ModularAddition(p=p, train_fraction=train_fraction)
        if n is None
        else Addition(n=n, block=min(10, n // 5), train_fraction=train_fraction)
    )
    pairs = task.split_size("train")
    if pairs > MOST_PAIRS:
        raise BadInput(f"{pairs} training pairs need as many neurons: expected at most {MOST_PAIRS}; lower the size")
    generator = torch.Generator().manual_seed(seed)
    operands = task.examples("train").operands
    answers = torch.searchsorted(task.answer_values, task.answer(operands))
    values, n_answers = task.n_operand_values, len(task.answer_values)
    code, w_in, b_in = (_unordered if symmetric else _ordered)(operands, values, width, generator)
    w_out = one_hot(answers, n_answers) * GAIN
    if symmetric:
        # On (a, a) all neurons of {a, b} fire too: for each b at most two, (a, b) and (b, a), with one answer.
        w_out[operands[:, 0] == operands[:, 1]] *= 3
    inputs = w_in.shape[0]
    guess = normal(inputs, n_answers, generator=generator)
    guess = guess * GUESS * GAIN / _spread(code, guess, symmetric)
    mechanism = Mechanism(
        code,
        "sum" if symmetric else "apart",
        (Neurons(w_in, b_in, w_out),),
        torch.eye(n_answers, dtype=torch.float64),
        shortcut=guess,
    )
    return Reference(wire(task, mechanism, generator=generator), task, "memorisation/pairs")


def _ordered(
    operands: Int[Tensor, "pairs 2"], values: int, width: int, generator: torch.Generator
) -> tuple[Float[Tensor, "values width"], Float[Tensor, "inputs pairs"], Float[Tensor, " pairs"]]:
    """Random unit vectors of the values, and the neurons that fire on one ordered pair each."""
    code = normal(values, width, generator=generator)
    code = code / code.norm(dim=1, keepdim=True)
    coherence = float((code @ code.T).fill_diagonal_(-1).max())
    if coherence > 0.99:
        raise BadInput(f"{values} random vectors of width {width} are too close to each other: expected a larger width")
    w_in = torch.cat([code[operands[:, 0]], code[operands[:, 1]]], dim=1).T / (1 - coherence)
    return code, w_in, torch.full((len(operands),), -(1 + coherence) / (1 - coherence), dtype=torch.float64)


def _unordered(
    operands: Int[Tensor, "pairs 2"], values: int, width: int, generator: torch.Generator
) -> tuple[Float[Tensor, "values values"], Float[Tensor, "values pairs"], Float[Tensor, " pairs"]]:
    """One-hot vectors, and the neurons that fire on one unordered pair each (and on its members' doubles)."""
    w_in = 2 * (one_hot(operands[:, 0], values) + one_hot(operands[:, 1], values)).clamp_max(1).T
    return torch.eye(values, dtype=torch.float64), w_in, torch.full((len(operands),), -3.0, dtype=torch.float64)


def _spread(code: Float[Tensor, "values width"], guess: Float[Tensor, "inputs answers"], symmetric: bool) -> float:
    """Largest difference between two guessed logits over all pairs (an upper bound: operands taken one by one)."""
    halves = [guess, guess] if symmetric else guess.split(code.shape[1])
    logits = [code @ half for half in halves]
    return sum(float((x.amax(1) - x.amin(1)).max()) for x in logits)
