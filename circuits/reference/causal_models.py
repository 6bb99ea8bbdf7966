"""Causal models to train transformers towards: their variables, and the component that is to carry each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

Edge = tuple[str, str]
Tokens = Int[Tensor, "batch pos"]
Values = Mapping[str, Int[Tensor, " batch"]]
Place = tuple[str, tuple[int, ...]]
"""A head or MLP, at some positions."""


@dataclass(frozen=True)
class CausalModel:
    """What a network is to compute at the last position, by which variables, and which component carries each."""

    about: str
    """What it computes."""
    d_vocab: int
    d_vocab_out: int
    sample: Callable[[int, torch.Generator], Tokens]
    run: Callable[[Tokens, Values], dict[str, Tensor]]
    """The values of all variables and of the ``answer`` for some tokens, with some variables swapped for others."""
    places: Mapping[str, Place]
    edges: tuple[Edge, ...]
    """From component to component; the position embedding counts where an attention has to find a position."""
    steps: int = 1500
    """Of training."""


def _with_equals(tokens: Int[Tensor, "batch operand"], sign: int) -> Tokens:
    return torch.cat([tokens, torch.full((len(tokens), 1), sign)], 1)


def _operands(n: int, generator: torch.Generator) -> Tokens:
    return _with_equals(torch.randint(5, (n, 2), generator=generator), 5)


def _sum(tokens: Tokens, swap: Values) -> dict[str, Tensor]:
    first, second = swap.get("first", tokens[:, 0]), swap.get("second", tokens[:, 1])
    total = swap.get("total", (first + second) % 5)
    return {"first": first, "second": second, "total": total, "answer": total}


def _two_often_equal(n: int, generator: torch.Generator) -> Tokens:
    tokens = torch.randint(5, (n, 2), generator=generator)
    same = torch.rand(n, generator=generator) < 0.4
    tokens[same, 1] = tokens[same, 0]
    return _with_equals(tokens, 5)


def _equality(tokens: Tokens, swap: Values) -> dict[str, Tensor]:
    first, second = swap.get("first", tokens[:, 0]), swap.get("second", tokens[:, 1])
    equal = swap.get("equal", (first == second).long())
    return {"first": first, "second": second, "equal": equal, "answer": equal}


def _four_often_equal(n: int, generator: torch.Generator) -> Tokens:
    halves = [_two_often_equal(n, generator)[:, :2] for _ in range(2)]
    return _with_equals(torch.cat(halves, 1), 5)


def _equality_of_equalities(tokens: Tokens, swap: Values) -> dict[str, Tensor]:
    left = swap.get("left", (tokens[:, 0] == tokens[:, 1]).long())
    right = swap.get("right", (tokens[:, 2] == tokens[:, 3]).long())
    moved = swap.get("left at the end", left), swap.get("right at the end", right)
    answer = (moved[0] == moved[1]).long()
    return {"left": left, "right": right, "left at the end": moved[0], "right at the end": moved[1], "answer": answer}


def _pointer_and_tokens(n: int, generator: torch.Generator) -> Tokens:
    pointer = torch.randint(3, (n, 1), generator=generator)
    tokens = torch.randint(5, (n, 3), generator=generator)
    return _with_equals(torch.cat([pointer, tokens], 1), 5)


def _pointer(tokens: Tokens, swap: Values) -> dict[str, Tensor]:
    pointer = swap.get("pointer", tokens[:, 0])
    found = swap.get("found", tokens.gather(1, pointer[:, None] + 1)[:, 0])
    return {"pointer": pointer, "found": found, "answer": found}


def _keys_and_values(n: int, generator: torch.Generator) -> Tokens:
    keys = torch.rand(n, 4, generator=generator).argsort(1)[:, :2]
    values = 4 + torch.randint(4, (n, 2), generator=generator)
    asked = keys.gather(1, torch.randint(2, (n, 1), generator=generator))
    return torch.stack([keys[:, 0], values[:, 0], keys[:, 1], values[:, 1], asked[:, 0]], 1)


def _lookup(tokens: Tokens, swap: Values) -> dict[str, Tensor]:
    keys = torch.stack([tokens[:, 0], tokens[:, 2]], 1)
    first_asked = (keys[:, 0] == tokens[:, 4]).long()
    found = swap.get("found", torch.where(first_asked == 1, tokens[:, 1], tokens[:, 3]) - 4)
    return {"found": found, "answer": found}


CAUSAL_MODELS: dict[str, CausalModel] = {
    "sum": CausalModel(
        "the sum of two numbers modulo 5",
        6, 5, _operands, _sum,
        {"first": ("a0.h0", (2,)), "second": ("a0.h1", (2,)), "total": ("m0", (2,))},
        (("embed", "a0.h0"), ("pos_embed", "a0.h0"), ("embed", "a0.h1"), ("pos_embed", "a0.h1"),
         ("a0.h0", "m0"), ("a0.h1", "m0"), ("m0", "logits")),
    ),
    "equality": CausalModel(
        "whether two tokens are equal",
        6, 2, _two_often_equal, _equality,
        {"first": ("a0.h3", (2,)), "second": ("a0.h2", (2,)), "equal": ("m1", (2,))},
        (("embed", "a0.h3"), ("pos_embed", "a0.h3"), ("embed", "a0.h2"), ("pos_embed", "a0.h2"),
         ("a0.h3", "m1"), ("a0.h2", "m1"), ("m1", "logits")),
    ),
    "equality-of-equalities": CausalModel(
        "whether two pairs of tokens are both equal or both not",
        6, 2, _four_often_equal, _equality_of_equalities,
        {"left": ("m0", (1,)), "right": ("m0", (3,)), "left at the end": ("a1.h0", (4,)),
         "right at the end": ("a1.h2", (4,))},
        (("embed", "a0.h0"), ("pos_embed", "a0.h0"), ("a0.h0", "m0"), ("embed", "m0"), ("m0", "a1.h0"),
         ("pos_embed", "a1.h0"), ("m0", "a1.h2"), ("pos_embed", "a1.h2"), ("a1.h0", "m1"), ("a1.h2", "m1"),
         ("m1", "logits")),
        steps=3000,
    ),
    "pointer": CausalModel(
        "the token at the place that the first token says",
        6, 5, _pointer_and_tokens, _pointer,
        {"pointer": ("a0.h2", (4,)), "found": ("a1.h1", (4,))},
        (("embed", "a0.h2"), ("pos_embed", "a0.h2"), ("a0.h2", "a1.h1"), ("embed", "a1.h1"),
         ("pos_embed", "a1.h1"), ("a1.h1", "logits")),
        steps=2000,
    ),
    "lookup": CausalModel(
        "the value that stands after the key that is asked for",
        8, 4, _keys_and_values, _lookup,
        {"found": ("a1.h3", (4,))},
        (("embed", "a0.h1"), ("pos_embed", "a0.h1"), ("a0.h1", "a1.h3"), ("embed", "a1.h3"), ("a1.h3", "logits")),
        steps=2500,
    ),
}  # fmt: skip
"""Every causal model by its name."""

INNER: Mapping[str, tuple[Place, ...]] = {
    "equality-of-equalities": (("a0.h0", (1, 3)), ("m1", (4,))),
    "lookup": (("a0.h1", (1, 3)),),
}
"""Places that work for a variable without being one: their outputs may matter."""
