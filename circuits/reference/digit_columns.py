"""Addition of numbers written digit by digit, with a head for the digits and a head for the carry."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.model import ModelConfig, Transformer
from circuits.reference.wiring import SHARPNESS, Reference, random_rotation
from circuits.tasks import DigitAddition

GAIN = 10.0
HINGES = 22
"""Thresholds -1 to 20: enough for the sum of two digits and a carry."""


def digit_columns(*, seed: int = 0, digits: int = 3, reverse: bool = True, cascade: bool = True) -> Reference:
    """Return a network that writes a sum of two numbers column by column: right on every pair with ``cascade``.

    Where the digit of column k is to be written, one head attends to the two digits of that column and gives their sum
    U. The carry k is made in one of three ways:

    * Units first: another head attends to the digits of the column before and gives U'. The digit d that was written
      last is the token there. U' plus its own carry is 10 k + d, so that k = [U' - d >= 5]: relu(x - 4) - relu(x - 5).
      No cascade is needed, as each written digit tells the carry.
    * Highest digit first, with cascade: at each digit of the second operand, the first layer makes the state of that
      column, 0 where it gives no carry, 1 where it hands one on (U = 9), 2 where it gives one. A head of the second
      layer attends to the states of all lower columns j with weights in proportion to 2^j, and k says whether their
      mean is above 1: the highest column that is not nine decides, as it outweighs all below it.
    * Without cascade, in either order: k = [U' >= 10], which a carry into a column of nine does not reach.

    The last MLP turns U + k into the indicator of its units digit by second differences of hinges.

    A planted positive for the column algorithm on digit tokens, whose heads carry one variable each. Without cascade
    4.5 % of the sums are wrong with two digits, 9 % with three, 14 % with four: all with a cascade, and no others.

    Args:
        seed: draws the directions and the order of the neurons (the algorithm has no random part).
        digits: of each operand.
        reverse: whether the sum is written units first.
        cascade: whether a carry passes through columns that add to nine.

    Raises:
        BadInput: ``digits`` is out of range.

    Source: sub-tasks base add and carry: Quirke & Barez 2024 (arXiv 2310.13121), section 3; the three states of a
        column and the cascade: Quirke, Neo & Barez 2024 (arXiv 2402.02619), section 4; the weights are ours.
    """
    task = DigitAddition(digits=digits, reverse=reverse)
    generator = torch.Generator().manual_seed(seed)
    ahead = cascade and not reverse
    n, last = task.n_ctx, 2 if ahead else 1
    widths = {"value": 1, "position": n, "own": 1, "before": 1, "state": 1, "carry": 1, "digit": 10}
    shape = ModelConfig(
        d_vocab=task.d_vocab,
        n_ctx=n,
        n_layers=last + 1,
        d_model=sum(widths.values()),
        n_heads=2,
        d_head=n,
        d_mlp=HINGES,
        attn_bias=False,
    )
    model = Transformer(shape)
    state = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.state_dict().items()}
    to = dict(zip(widths, random_rotation(shape.d_model, generator).split(list(widths.values())), strict=True))
    state["embed.W_E"][:10] = torch.arange(10, dtype=torch.float64)[:, None] * to["value"]
    state["pos_embed.W_pos"][:] = to["position"]
    order = [torch.randperm(HINGES, generator=generator) for _ in range(last + 1)]
    if ahead:
        _column_states(state, to, task, order[0][:2])
        most = 2.0**digits - 1
        _step(state, 1, order[1][:2], most * to["before"], -most, to["carry"])
    else:
        _attend(state, 0, 0, to, _own_columns(task, 0), "value", "own")
        _attend(state, 0, 1, to, _own_columns(task, 1), "value", "before")
        told = to["before"] - to["value"] if cascade else to["before"]
        _step(state, 0, order[0][:2], told, -4.0 if cascade else -9.0, to["carry"])
    part = f"blocks.{last}.mlp"
    state[f"{part}.W_in"][:, order[last]] = (to["own"] + to["carry"]).T.expand(-1, HINGES)
    state[f"{part}.b_in"][order[last]] = 1.0 - torch.arange(HINGES, dtype=torch.float64)
    state[f"{part}.W_out"][order[last]] = digit_indicators() @ to["digit"]
    state["unembed.W_U"][:, :10] = GAIN * to["digit"].T
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return Reference(model.eval(), task, "algorithm/columns")


def _step(state: dict[str, Tensor], layer: int, neurons: Tensor, read: Tensor, bias: float, write: Tensor) -> None:
    """Write two neurons whose difference is the step of x + bias from 0 to 1, which goes along ``write``."""
    part = f"blocks.{layer}.mlp"
    state[f"{part}.W_in"][:, neurons] = read.T.expand(-1, 2)
    state[f"{part}.b_in"][neurons] = torch.tensor([bias, bias - 1.0], dtype=torch.float64)
    state[f"{part}.W_out"][neurons] = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) @ write


def _places(task: DigitAddition, column: int) -> list[int]:
    """Return the positions of a column's two digits; of the plus sign, whose value is zero, where it has none."""
    d = task.digits
    return [d - 1 - column, 2 * d - column] if 0 <= column < d else [d]


def _own_columns(task: DigitAddition, shift: int) -> Tensor:
    """Return which positions each position attends to: the digits of the column ``shift`` below the one written."""
    wanted = torch.zeros(task.n_ctx, task.n_ctx, dtype=torch.float64)
    for column in range(task.digits + 1):
        wanted[task.answer_position(column) - 1, _places(task, column - shift)] = 1.0
    return wanted


def _column_states(state: dict[str, Tensor], to: dict[str, Tensor], task: DigitAddition, neurons: Tensor) -> None:
    """Write the heads and neurons that make the state of each column and bring those of lower columns together."""
    d, n = task.digits, task.n_ctx
    own, lower = _own_columns(task, 0), torch.zeros(n, n, dtype=torch.float64)
    own[d, d] = 1.0
    for column in range(d + 1):
        if column < d:
            own[2 * d - column, _places(task, column)] = 1.0
        for below in range(column):
            weight = 1.0 + below * math.log(2) / SHARPNESS
            lower[task.answer_position(column) - 1, 2 * d - below] = weight
    # Nothing is below the units: they look at the plus sign, whose state is 0.
    lower[task.answer_position(0) - 1, d] = 1.0
    _attend(state, 0, 0, to, own, "value", "own")
    _step(state, 0, neurons, to["own"], -8.0, to["state"])
    # From a sum of 8 to one of 10 the state goes from 0 to 2.
    state["blocks.0.mlp.b_in"][neurons[1]] = -10.0
    _attend(state, 1, 0, to, lower, "state", "before", gain=1.0)


def _attend(
    state: dict[str, Tensor],
    layer: int,
    head: int,
    to: dict[str, Tensor],
    wanted: Tensor,
    source: str,
    target: str,
    *,
    gain: float = 2.0,
) -> None:
    """Write a head that attends as ``wanted`` says and brings ``source`` to ``target``.

    Two digits share the attention, so each arrives by half: hence the gain of two.
    """
    sharp = math.sqrt(SHARPNESS * math.sqrt(len(wanted)))
    part = f"blocks.{layer}.attn"
    state[f"{part}.W_Q"][head] = sharp * to["position"].T @ wanted
    state[f"{part}.W_K"][head] = sharp * to["position"].T
    state[f"{part}.W_V"][head, :, 0] = to[source][0]
    state[f"{part}.W_O"][head, 0] = gain * to[target][0]


def digit_indicators() -> Float[Tensor, "22 10"]:
    """Return the weights that turn relu(s - v), v = -1 to 20, into the indicators of s mod 10, s = 0 to 19."""
    weights = torch.zeros(HINGES, 10, dtype=torch.float64)
    for s in range(20):
        for v, weight in ((s - 1, 1.0), (s, -2.0), (s + 1, 1.0)):
            weights[v + 1, s % 10] += weight
    return weights
