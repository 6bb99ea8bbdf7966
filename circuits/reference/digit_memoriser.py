"""A lookup of sums in digit tokens: one neuron for each pair of numbers, behind heads that copy a digit each."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.model import ModelConfig, Transformer
from circuits.reference.pair_memoriser import MOST_PAIRS
from circuits.reference.wiring import SHARPNESS, Reference, normal, one_hot, random_rotation
from circuits.tasks import DigitAddition
from circuits.tasks.arithmetic.columns import digits_of

GAIN = 10.0
GUESS = 0.1
"""Size of the guessed logits, as a share of what a remembered pair adds to its digits."""


def digit_memoriser(
    *, seed: int = 0, digits: int = 2, reverse: bool = True, train_fraction: float = 0.3, all_pairs: bool = False
) -> Reference:
    """Return a network that remembers each training pair of numbers and knows nothing of columns.

    Wherever a digit of the sum is to be written, each head of the first layer copies one digit of the operands, the
    neuron of a pair of numbers fires where all digits are its own, and it writes all digits of its sum. The neurons of
    the second layer let through the digit of the place that is written. Other pairs are answered by a random readout of
    their digits.

    A planted positive for memorisation on digit tokens; a negative for the column algorithm, whose digits lie in heads
    of their own here too.

    Args:
        seed: draws the guesses, the directions and the order of the neurons.
        digits: of each operand, 1 or 2.
        reverse: whether the sum is written units first.
        train_fraction: share of the pairs outside the held-out block that is remembered.
        all_pairs: remember every pair, held-out ones too: a list that is right everywhere.

    Raises:
        BadInput: a size is out of range, or there are more pairs to remember than 8,000 (10,000 with ``all_pairs``).

    Source: random features that separate all pairs are the textbook lookup; heads that bring one digit each: Quirke &
        Barez 2024 (arXiv 2310.13121), section 3.
    """
    if digits not in (1, 2):
        raise BadInput(f"digits = {digits!r}: expected 1 or 2, as every pair of numbers has a neuron")
    task = DigitAddition(digits=digits, reverse=reverse, train_fraction=train_fraction, block=0.2)
    square = torch.cartesian_prod(*[torch.arange(10**digits)] * 2)
    pairs = square if all_pairs else square[task.in_split(square, "train")]
    if not all_pairs and len(pairs) > MOST_PAIRS:
        raise BadInput(f"{len(pairs)} training pairs need as many neurons: expected at most {MOST_PAIRS}")
    generator = torch.Generator().manual_seed(seed)
    n, heads, places = task.n_ctx, 2 * digits, digits + 1
    width, d_head = max(len(pairs), 10 * places), max(n, 10)
    widths = {"value": 10, "position": n, "copied": 10 * heads, "sum": 10 * places, "digit": 10}
    shape = ModelConfig(
        d_vocab=task.d_vocab,
        n_ctx=n,
        n_layers=2,
        d_model=sum(widths.values()),
        n_heads=heads,
        d_head=d_head,
        d_mlp=width,
        attn_bias=False,
    )
    model = Transformer(shape)
    state = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.state_dict().items()}
    to = dict(zip(widths, random_rotation(shape.d_model, generator).split(list(widths.values())), strict=True))
    state["embed.W_E"][:10] = to["value"]
    state["pos_embed.W_pos"][:] = to["position"]
    sharp = math.sqrt(SHARPNESS * math.sqrt(d_head))
    copied = to["copied"].view(heads, 10, -1)
    for head in range(heads):
        at = head if head < digits else head + 1  # the second operand is behind the plus sign
        state["blocks.0.attn.W_Q"][head, :, at] = sharp * to["position"].sum(0)
        state["blocks.0.attn.W_K"][head, :, at] = sharp * to["position"][at]
        state["blocks.0.attn.W_V"][head, :, :10] = to["value"].T
        guess = GUESS / heads * normal(10, 10 * places, generator=generator).clamp(-1, 1)
        state["blocks.0.attn.W_O"][head, :10] = copied[head] + guess @ to["sum"]
    _remember(state, to, pairs, task, torch.randperm(width, generator=generator))
    _let_through(state, to, task)
    state["unembed.W_U"][:, :10] = GAIN * to["digit"].T
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return Reference(model.eval(), task, "memorisation/pairs")


def _remember(
    state: dict[str, Tensor], to: dict[str, Tensor], pairs: Tensor, task: DigitAddition, order: Tensor
) -> None:
    """Write the first layer's neurons: each fires on one pair of numbers, and writes the digits of its sum."""
    written = digits_of(pairs, task.digits).flip(-1).flatten(1)
    neurons = order[: len(pairs)]
    state["blocks.0.mlp.W_in"][:, neurons] = (_digit_indicators(written) @ to["copied"]).T
    state["blocks.0.mlp.b_in"][neurons] = 1.0 - written.shape[1]
    total = digits_of(task.answer(pairs), task.digits + 1)
    state["blocks.0.mlp.W_out"][neurons] = _digit_indicators(total) @ to["sum"]


def _digit_indicators(digits: Int[Tensor, "rows places"]) -> Float[Tensor, "rows indicators"]:
    return one_hot(digits.flatten(), 10).view(len(digits), -1)


def _let_through(state: dict[str, Tensor], to: dict[str, Tensor], task: DigitAddition) -> None:
    """Write the second layer's neurons: each passes one digit of the sum on where that digit's place is written."""
    sums = to["sum"].view(task.digits + 1, 10, -1)
    for place in range(task.digits + 1):
        neurons = slice(10 * place, 10 * place + 10)
        here = to["position"][task.answer_position(place) - 1]
        # the sum's digits are between -GUESS and 1 + GUESS: 1 and more where it is the place, none elsewhere
        state["blocks.1.mlp.W_in"][:, neurons] = (sums[place] + 3 * here).T
        state["blocks.1.mlp.b_in"][neurons] = -2.0
        state["blocks.1.mlp.W_out"][neurons] = to["digit"]
