"""Prompts for pretrained language models: indirect objects and later years, in pairs, and sums."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.base import Pairs

# fmt: off
NAMES = (
    "Mary", "John", "Tom", "James", "Dan", "Martin", "Sarah", "Paul", "Anna", "Kate", "Laura", "Emma", "Mark",
    "Peter", "David", "Michael", "Alice", "Robert", "Helen", "Jane", "Susan", "Simon", "George", "Henry",
    "Jack", "Alex", "Max", "Rachel", "Emily", "Lucy",
)
PLACES = (
    "store", "park", "school", "office", "garden", "station", "library", "kitchen",
)
OBJECTS = (
    "ring", "drink", "snack", "book", "letter", "gift", "bone", "computer",
)
EVENTS = (
    "war", "siege", "plague", "campaign", "expedition", "voyage", "study", "project", "journey", "marriage",
    "career", "mission", "struggle", "tour",
)
# fmt: on
CENTURIES = (11, 12, 13, 14, 15, 16, 17)


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of Hugging Face have it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the tokens of a text."""
        ...


def indirect_object_pairs(
    tokenizer: Tokenizer,
    n: int,
    *,
    seed: int = 0,
    names: Sequence[str] = NAMES,
    places: Sequence[str] = PLACES,
    objects: Sequence[str] = OBJECTS,
    start: Sequence[int] = (),
) -> Pairs:
    """Return prompts as "When Mary and John went to the store, John gave a drink to", each a different one.

    The answer is the name that stands once. In the corrupt prompt the other name stands twice, so one token differs
    and the answer is the other name. Either order of the names is as likely.

    Args:
        tokenizer: Of the model.
        n: Number of pairs.
        seed: Of the draw.
        names: To draw two from; those that are not one token after a space are left out.
        places: To draw one from, likewise.
        objects: To draw one from, likewise.
        start: Tokens to put before every prompt, for models that need one there.

    Source: Wang et al. 2023, arXiv 2211.00593, section 2; the corruption is the flip of the second subject of
        Mueller et al. 2025, arXiv 2504.13151.

    Raises:
        BadInput: the words allow no ``n`` different prompts.
    """
    people, where, what = (
        [word for word in words if len(_tokens(tokenizer, f" {word}")) == 1] for words in (names, places, objects)
    )
    choices = [
        (a, b, again, place, thing)
        for a, b in itertools.permutations(people, 2)
        for again in (a, b)
        for place in where
        for thing in what
    ]
    rows = []
    for i in _draw(len(choices), n, seed, "prompts with an indirect object"):
        a, b, subject, place, thing = choices[i]
        other = b if subject == a else a
        clean, corrupt = (
            [*start, *_tokens(tokenizer, f"When {a} and {b} went to the {place}, {who} gave a {thing} to")]
            for who in (subject, other)
        )
        rows.append((clean, corrupt, _tokens(tokenizer, f" {other}")[0], _tokens(tokenizer, f" {subject}")[0]))
    return _pairs(rows, "subject")


def greater_than_pairs(
    tokenizer: Tokenizer,
    n: int,
    *,
    seed: int = 0,
    events: Sequence[str] = EVENTS,
    centuries: Sequence[int] = CENTURIES,
    start: Sequence[int] = (),
) -> Pairs:
    """Return prompts as "The war lasted from the year 1732 to the year 17", each a different one.

    Any later year is right; in the corrupt prompt the war starts in the year 1701. ``later_year_probability`` is the
    metric for them. A tokenizer with a token for every two digits is asked for the whole year, one that splits years
    into digits for the decade. ``correct`` is the first year, or decade, after that of the clean prompt, and
    ``wrong`` the first that the corrupt prompt allows.

    Args:
        tokenizer: Of the model.
        n: Number of pairs.
        seed: Of the draw.
        events: What lasts, to draw from.
        centuries: The years' first two digits, to draw from.
        start: Tokens to put before every prompt, for models that need one there.

    Source: Hanna, Liu and Variengien 2023, arXiv 2305.00586, section 3.

    Raises:
        BadInput: the tokenizer splits years otherwise, or the words allow no ``n`` different prompts of one length.
    """
    answers = _year_tokens(tokenizer)
    unit = 100 // len(answers)
    years = range(10, 90) if unit == 10 else range(3, 99)
    choices = list(itertools.product(events, centuries, years))
    by_length: dict[int, list[tuple[list[int], list[int], int, int]]] = defaultdict(list)
    for i in _draw(len(choices), len(choices), seed, "prompts about later years"):
        event, century, year = choices[i]
        clean, corrupt = (
            [*start, *_tokens(tokenizer, f"The {event} lasted from the year {century}{y:02} to the year {century}")]
            for y in (year, 1)
        )
        if len(clean) == len(corrupt):
            rows = by_length[len(clean)]
            rows.append((clean, corrupt, answers[year // unit + 1], answers[0 if unit == 10 else 2]))
            if len(rows) == n:
                return _pairs(rows, "year")
    most = max(map(len, by_length.values()), default=0)
    raise BadInput(f"n = {n} prompts about later years: the words, as this tokenizer splits them, allow 1 to {most}")


def later_year_probability(
    tokenizer: Tokenizer,
) -> Callable[[Float[Tensor, "batch d_vocab_out"], Pairs], Float[Tensor, " batch"]]:
    """Return the metric of ``greater_than_pairs``: probability of the later years less that of the others.

    Where the answer is a decade, that of the start year counts neither way, since it has years of both kinds.

    Args:
        tokenizer: Of the model.

    Source: Hanna, Liu and Variengien 2023, arXiv 2305.00586, section 3.1.

    Raises:
        BadInput: the tokenizer splits years neither into pairs of digits nor into digits.
    """
    answers = torch.tensor(_year_tokens(tokenizer))
    whole_years = len(answers) == 100

    def later_year_probability(logits: Float[Tensor, "batch d_vocab_out"], pairs: Pairs) -> Float[Tensor, " batch"]:
        tokens = answers.to(logits.device)
        first_later = (tokens == pairs.correct.to(logits.device)[:, None]).int().argmax(1, keepdim=True)
        number = torch.arange(len(tokens), device=logits.device)
        sign = (number >= first_later).int() - (number < first_later - (0 if whole_years else 1)).int()
        return (logits.softmax(-1)[:, tokens] * sign).sum(1)

    return later_year_probability


@dataclass(frozen=True, eq=False)
class Sums:
    """Prompts that end where a token of a sum is to be said, and which token that is."""

    tokens: Int[Tensor, "batch pos"]
    answer: Int[Tensor, " batch"]
    operands: Int[Tensor, "batch 2"]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def take(self, rows: Tensor) -> Sums:
        """Return some of the prompts, by index or mask."""
        return Sums(self.tokens[rows], self.answer[rows], self.operands[rows])


def sum_prompts(
    tokenizer: Tokenizer,
    operands: Int[Tensor, "batch 2"],
    *,
    shots: Sequence[tuple[int, int]] = (),
    said: int = 0,
    text: str = "{a}+{b}={sum}\n",
    start: Sequence[int] = (),
) -> Sums:
    """Return prompts as "12+30=42, new line, 31+46=", each up to one token of its sum.

    A tokenizer with a token for each digit answers with the first digit of the sum, and with ``said`` = 1, when the
    first token of the sum stands in the prompt, with the second.

    Args:
        tokenizer: Of the model.
        operands: The numbers to add, from zero up.
        shots: Worked examples that stand before every prompt.
        said: So many tokens of the sum stand in the prompt already.
        text: How an example is written, with ``{a}``, ``{b}`` and, last of the three, ``{sum}``.
        start: Tokens to put before every prompt, for models that need one there.

    Source: Nikankin et al. 2025 (arXiv 2410.21272), section 2.1, for "op1+op2=" with an answer of one token.

    Raises:
        BadInput: prompts differ in length, a sum has no token beyond those said, or the tokenizer joins a sum with
            what stands before it.
    """
    before, mark, _ = text.partition("{sum}")
    if not mark or not all(name in before for name in ("{a}", "{b}")):
        raise BadInput(f"text = {text!r}: expected {{a}} and {{b}} before {{sum}}")
    examples = "".join(text.format(a=a, b=b, sum=a + b) for a, b in shots)
    rows, answers = [], []
    for a, b in operands.tolist():
        prompt = examples + before.format(a=a, b=b)
        known, whole = _tokens(tokenizer, prompt), _tokens(tokenizer, f"{prompt}{a + b}")
        if whole[: len(known)] != known:
            raise BadInput(f"the tokenizer joins the sum with what stands before it in {prompt!r}: try another text")
        if len(whole) <= len(known) + said:
            raise BadInput(f"{a} + {b} = {a + b} has {len(whole) - len(known)} tokens: none is left after {said}")
        rows.append([*start, *whole[: len(known) + said]])
        answers.append(whole[len(known) + said])
    if len({len(row) for row in rows}) != 1:
        raise BadInput("the prompts differ in length: give operands with as many digits")
    return Sums(torch.tensor(rows), torch.tensor(answers), operands)


def _tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _year_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens of the years of a century, 00 to 99, or of its decades, in order."""
    split = [_tokens(tokenizer, f"{year:02}") for year in range(100)]
    lengths = {len(tokens) for tokens in split}
    answers = [tokens[0] for tokens in (split if lengths == {1} else split[::10])]
    if lengths not in ({1}, {2}) or len(set(answers)) != len(answers):
        raise BadInput(
            f"the tokenizer splits years of two digits into {sorted(lengths)} tokens: expected one token for each "
            f"year, or one for each digit"
        )
    return answers


def _draw(n_choices: int, n: int, seed: int, what: str) -> list[int]:
    if not 1 <= n <= n_choices:
        raise BadInput(f"n = {n} {what}: the words, as this tokenizer splits them, allow 1 to {n_choices}")
    return torch.randperm(n_choices, generator=torch.Generator().manual_seed(seed))[:n].tolist()


def _pairs(rows: Sequence[tuple[list[int], list[int], int, int]], changed: str) -> Pairs:
    clean, corrupt, correct, wrong = (torch.tensor(column) for column in zip(*rows, strict=True))
    position: Int[Tensor, " batch"] = torch.full((len(rows),), clean.shape[1] - 1)
    return Pairs(clean, corrupt, position, correct, wrong, changed)
