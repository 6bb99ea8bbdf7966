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


def digit_columns(*, seed: int = 0, digits: int = 3, cascade: bool = True) -> Reference:
    """Return a network that writes a sum of two numbers units first, column by column: right on every pair.

    Where the digit of column k is to be written, one head attends to the two digits of that column and gives their sum
    U; another attends to those of the column before and gives U'. The digit d that was written last is the token there.
    Since U' plus its carry is 10 k + d, the carry k is [U' - d >= 5], which the first MLP computes as
    relu(x - 4) - relu(x - 5). The second MLP turns U + k into the indicator of its units digit by second differences of
    hinges. No cascade is needed: each written digit tells the carry.

    With ``cascade=False`` the carry is [U' >= 10], whatever was carried into the column before: wrong exactly where a
    column sums to nine and takes a carry in.

    A planted positive for the column algorithm on digit tokens, whose heads carry one variable each.

    Args:
        seed: draws the directions and the order of the neurons (the algorithm has no random part).
        digits: of each operand.
        cascade: whether a carry passes on through columns that sum to nine.

    Raises:
        BadInput: ``digits`` is out of range.

    Source: sub-tasks base add and carry: Quirke & Barez 2024 (arXiv 2310.13121), section 3; the weights are ours.
    """
    task = DigitAddition(digits=digits, reverse=True)
    generator = torch.Generator().manual_seed(seed)
    n = task.n_ctx
    widths = {"value": 1, "position": n, "own": 1, "before": 1, "carry": 1, "digit": 10}
    d_model = sum(widths.values())
    model = Transformer(
        ModelConfig(
            d_vocab=task.d_vocab,
            n_ctx=n,
            n_layers=2,
            d_model=d_model,
            n_heads=2,
            d_head=n,
            d_mlp=HINGES,
            attn_bias=False,
        )
    )
    state = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.state_dict().items()}
    to = dict(zip(widths, random_rotation(d_model, generator).split(list(widths.values())), strict=True))
    state["embed.W_E"][:10] = torch.arange(10, dtype=torch.float64)[:, None] * to["value"]
    state["pos_embed.W_pos"][:] = to["position"]
    _heads(state, to, task)
    first, second = (torch.randperm(HINGES, generator=generator) for _ in range(2))
    ones = torch.ones(1, 2, dtype=torch.float64)
    compared, last_without = (to["before"] - to["value"], 4.0) if cascade else (to["before"], 9.0)
    state["blocks.0.mlp.W_in"][:, first[:2]] = compared.T @ ones
    state["blocks.0.mlp.b_in"][first[:2]] = -torch.tensor([last_without, last_without + 1], dtype=torch.float64)
    state["blocks.0.mlp.W_out"][first[:2]] = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) @ to["carry"]
    state["blocks.1.mlp.W_in"][:, second] = (to["own"] + to["carry"]).T.expand(-1, HINGES)
    state["blocks.1.mlp.b_in"][second] = 1.0 - torch.arange(HINGES, dtype=torch.float64)
    state["blocks.1.mlp.W_out"][second] = digit_indicators() @ to["digit"]
    state["unembed.W_U"][:, :10] = GAIN * to["digit"].T
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return Reference(model.eval(), task, "algorithm/columns")


def _heads(state: dict[str, Tensor], to: dict[str, Tensor], task: DigitAddition) -> None:
    """Write the first layer's attention: own column's digits, and those of the column before."""
    n, digits = task.n_ctx, task.digits
    wanted = torch.zeros(2, n, n, dtype=torch.float64)
    for column in range(digits + 1):
        for head, source in enumerate((column, column - 1)):
            # Where a column has no digits, the head looks at the plus sign, whose value is zero.
            places = [digits - 1 - source, 2 * digits - source] if 0 <= source < digits else [digits]
            wanted[head, task.answer_position(column) - 1, places] = 1.0
    gain = math.sqrt(SHARPNESS * math.sqrt(n))
    for head, target in enumerate(("own", "before")):
        state["blocks.0.attn.W_Q"][head] = gain * to["position"].T @ wanted[head]
        state["blocks.0.attn.W_K"][head] = gain * to["position"].T
        state["blocks.0.attn.W_V"][head, :, 0] = to["value"][0]
        # Two digits share the attention, so each arrives by half.
        state["blocks.0.attn.W_O"][head, 0] = 2 * to[target][0]


def digit_indicators() -> Float[Tensor, "22 10"]:
    """Return the weights that turn relu(s - v), v = -1 to 20, into the indicators of s mod 10, s = 0 to 19."""
    weights = torch.zeros(HINGES, 10, dtype=torch.float64)
    for s in range(20):
        for v, weight in ((s - 1, 1.0), (s, -2.0), (s + 1, 1.0)):
            weights[v + 1, s % 10] += weight
    return weights
