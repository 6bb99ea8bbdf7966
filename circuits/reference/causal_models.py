"""Causal models to train transformers towards: their variables, and the component that is to carry each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
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
    n_layers: int = 2
    d_model: int = 32
    d_mlp: int = 64
    normalization: str | None = None
    strict: bool = False
    """Whether training swaps sets of variables, and fixes the logits: what changes no answer is to change no logit."""
    flat: tuple[str, ...] = ()
    """Variables whose components are to act as steps: a move of up to 0.4 of the way changes nothing."""
    needed: tuple[Edge, ...] | None = None
    """Those of ``edges`` that the answer needs, where others cancel; None: all, those that stand in for others too."""
    differ: Callable[[Values, Values], Bool[Tensor, " batch"]] | None = None
    """Which clean and corrupt inputs, by their variables, make a pair; None: those with different answers."""
    n_answers: int | None = None
    """Logits, from the first, that the answer is among; the others are for the ``second answer`` that ``run`` gives."""


def _reads(head: str, *sources: str) -> tuple[Edge, ...]:
    """A head that finds a position, and reads there what a source wrote."""
    return tuple((source, head) for source in (*(sources or ("embed",)), "pos_embed"))


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


def _three_of_four(n: int, generator: torch.Generator) -> Tokens:
    return _with_equals(torch.randint(4, (n, 3), generator=generator), 4)


def _majority(tokens: Tokens, swap: Values) -> dict[str, Tensor]:
    copies = [swap.get(f"first, copy {i}", tokens[:, 0]) for i in range(3)]
    first = torch.where(copies[1] == copies[2], copies[1], copies[0])
    second = swap.get("second", tokens[:, 1])
    total = swap.get("total", (first + second) % 4)
    return {f"first, copy {i}": copy for i, copy in enumerate(copies)} | {
        "second": second, "total": total, "answer": total
    }  # fmt: skip


def _either(tokens: Tokens, swap: Values) -> dict[str, Tensor]:
    one, three = swap.get("first of the left", tokens[:, 0]), swap.get("first of the right", tokens[:, 2])
    left, right = swap.get("left", (one == tokens[:, 1]).long()), swap.get("right", (three == tokens[:, 3]).long())
    moved = swap.get("left at the end", left), swap.get("right at the end", right)
    out = {"first of the left": one, "first of the right": three, "left": left, "right": right}
    out |= {"left at the end": moved[0], "right at the end": moved[1]}
    either = swap.get("either", moved[0] | moved[1])
    return out | {"either": either, "answer": either}


def _both_and_neither(clean: Values, corrupt: Values) -> Bool[Tensor, " batch"]:
    return (clean["left"] & clean["right"] == 1) & (corrupt["left"] | corrupt["right"] == 0)


def _flag_and_two(n: int, generator: torch.Generator) -> Tokens:
    flag, two = torch.randint(2, (n, 1), generator=generator), torch.randint(4, (n, 2), generator=generator)
    return _with_equals(torch.cat([flag, two], 1), 4)


def _switch(tokens: Tokens, swap: Values) -> dict[str, Tensor]:
    flag, one, other = (swap.get(name, tokens[:, i]) for i, name in enumerate(("flag", "one", "other")))
    chosen = swap.get("chosen", torch.where(flag == 1, one, other))
    return {"flag": flag, "one": one, "other": other, "chosen": chosen, "answer": chosen}


def _three(n: int, generator: torch.Generator) -> Tokens:
    return _with_equals(torch.randint(5, (n, 3), generator=generator), 5)


def _two_and_a_bit(n: int, generator: torch.Generator) -> Tokens:
    numbers, bit = torch.randint(5, (n, 2), generator=generator), torch.randint(2, (n, 1), generator=generator)
    return _with_equals(torch.cat([numbers, bit], 1), 5)


def _relay(tokens: Tokens, swap: Values) -> dict[str, Tensor]:
    bit, out = tokens[:, 0] % 2, {}
    for name in ("odd", "moved", "renewed", "at the end", "said"):
        out[name] = bit = swap.get(name, bit)
    return out | {"answer": bit}


def _cancel(tokens: Tokens, swap: Values) -> dict[str, Tensor]:
    one, other = swap.get("one", tokens[:, 0]), swap.get("other", tokens[:, 1])
    plus, minus = swap.get("plus", tokens[:, 2]), swap.get("minus", tokens[:, 2])
    total = swap.get("total", (one + other + plus - minus) % 5)
    return {"one": one, "other": other, "plus": plus, "minus": minus, "total": total, "answer": total}


def _all_changed(clean: Values, corrupt: Values) -> Bool[Tensor, " batch"]:
    changed = [clean[name] != corrupt[name] for name in ("one", "other", "plus", "total")]
    return torch.stack(changed).all(0)


def _two_sums(n: int, generator: torch.Generator) -> Tokens:
    exception, numbers = torch.randint(8, (n, 1), generator=generator), torch.randint(3, (n, 4), generator=generator)
    return _with_equals(torch.cat([exception, numbers], 1), 8)


def _crowd(tokens: Tokens, swap: Values) -> dict[str, Tensor]:
    numbers = [swap.get(name, tokens[:, i + 1]) for i, name in enumerate(("one", "other", "third", "fourth"))]
    sums = (numbers[0] + numbers[1]) % 3 + 3 * ((numbers[2] + numbers[3]) % 3)
    sums = swap.get("sums", sums)
    exception = swap.get("exception", (tokens[:, 0] == 7).long())
    answer = swap.get("corrected", (sums % 3 + exception) % 3)
    out = dict(zip(("one", "other", "third", "fourth"), numbers, strict=True))
    out |= {"sums": sums, "exception": exception, "corrected": answer}
    return out | {"answer": answer, "second answer": sums // 3}


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
    # while two copies agree the third is idle: no single one of their edges has an effect
    "hard-majority": CausalModel(
        "the sum of two numbers modulo 4, the first of them by the majority of three copies",
        5, 4, _three_of_four, _majority,
        {"first, copy 0": ("a0.h0", (3,)), "first, copy 1": ("a0.h1", (3,)), "first, copy 2": ("a0.h2", (3,)),
         "second": ("a1.h2", (3,)), "total": ("m1", (3,))},
        (*_reads("a0.h0"), *_reads("a0.h1"), *_reads("a0.h2"), *_reads("a1.h2"),
         ("a0.h0", "m1"), ("a0.h1", "m1"), ("a0.h2", "m1"), ("a1.h2", "m1"), ("m1", "logits")),
        steps=4000, d_mlp=128, strict=True,
    ),
    # on pairs that change both, each way alone is idle
    "hard-either": CausalModel(
        "whether the tokens of one pair or of the other are equal, where both pairs are or neither is",
        6, 2, _four_often_equal, _either,
        {"first of the left": ("a0.h0", (1,)), "first of the right": ("a0.h3", (3,)), "left": ("m0", (1,)),
         "right": ("m0", (3,)), "left at the end": ("a1.h0", (4,)), "right at the end": ("a1.h2", (4,)),
         "either": ("m1", (4,))},
        (*_reads("a0.h0"), *_reads("a0.h3"), ("a0.h0", "m0"), ("a0.h3", "m0"), ("embed", "m0"),
         *_reads("a1.h0", "m0"), *_reads("a1.h2", "m0"), ("a1.h0", "m1"), ("a1.h2", "m1"), ("m1", "logits")),
        steps=3000, strict=True, differ=_both_and_neither,
    ),
    # steps have no slope at either input
    "hard-switch": CausalModel(
        "one of two tokens, as a flag says",
        5, 4, _flag_and_two, _switch,
        {"flag": ("a0.h0", (3,)), "one": ("a0.h3", (3,)), "other": ("a0.h1", (3,)), "chosen": ("m1", (3,))},
        (*_reads("a0.h0"), *_reads("a0.h1"), *_reads("a0.h3"), ("a0.h0", "m1"), ("a0.h1", "m1"), ("a0.h3", "m1"),
         ("m1", "logits")),
        steps=5000, d_mlp=128, strict=True, flat=("flag", "one", "other"),
    ),
    # steps after steps: no slope at either input, and a steep one at a single point between them
    "hard-relay": CausalModel(
        "whether the first token is odd, handed on four times",
        6, 2, _three, _relay,
        {"odd": ("m0", (0,)), "moved": ("a1.h1", (1,)), "renewed": ("m1", (1,)), "at the end": ("a2.h2", (3,)),
         "said": ("m2", (3,))},
        (("embed", "m0"), *_reads("a1.h1", "m0"), ("a1.h1", "m1"), *_reads("a2.h2", "m1"), ("a2.h2", "m2"),
         ("m2", "logits")),
        steps=3000, n_layers=3, strict=True, flat=("odd", "moved", "renewed", "at the end"),
    ),
    # each of two terms alone matters, and both together do not: no circuit needs them
    "hard-cancel": CausalModel(
        "the sum of two numbers modulo 5, with a bit both added and subtracted",
        6, 5, _two_and_a_bit, _cancel,
        {"one": ("a0.h3", (3,)), "other": ("a1.h2", (3,)), "plus": ("a0.h1", (3,)), "minus": ("a1.h0", (3,)),
         "total": ("m1", (3,))},
        (*_reads("a0.h3"), *_reads("a1.h2"), *_reads("a0.h1"), *_reads("a1.h0"),
         ("a0.h3", "m1"), ("a1.h2", "m1"), ("a0.h1", "m1"), ("a1.h0", "m1"), ("m1", "logits")),
        steps=3000, strict=True, differ=_all_changed,
        needed=(*_reads("a0.h3"), *_reads("a1.h2"), ("a0.h3", "m1"), ("a1.h2", "m1"), ("m1", "logits")),
    ),
    # parts share their directions with those of a task that the pairs do not ask for, and one is rarely used
    "hard-crowd": CausalModel(
        "a sum modulo 3 with an exception in one of eight inputs, in little room and beside a second task",
        9, 6, _two_sums, _crowd,
        {"one": ("a0.h0", (5,)), "other": ("a0.h1", (5,)), "third": ("a0.h2", (5,)), "fourth": ("a0.h3", (5,)),
         "sums": ("m0", (5,)), "exception": ("a1.h1", (5,)), "corrected": ("m1", (5,))},
        (*_reads("a0.h0"), *_reads("a0.h1"), ("a0.h0", "m0"), ("a0.h1", "m0"), ("m0", "m1"), *_reads("a1.h1"),
         ("a1.h1", "m1"), ("m1", "logits")),
        steps=6000, d_model=16, normalization="LN", strict=True, n_answers=3,
    ),
}  # fmt: skip
"""Every causal model by its name."""

INNER: Mapping[str, tuple[Place, ...]] = {
    "equality-of-equalities": (("a0.h0", (1, 3)), ("m1", (4,))),
    "lookup": (("a0.h1", (1, 3)),),
}
"""Places that work for a variable without being one: their outputs may matter."""
