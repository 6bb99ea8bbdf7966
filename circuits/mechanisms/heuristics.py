"""The heuristics of Nikankin et al.: what they are on a set of prompts, and how well activation maps match them.

Everything here works on plain tensors (maps over operand pairs, operands, results), so any model's maps will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import BadInput

MODULI = (*range(2, 12), 13, 15)
"""Moduli of the published list (2 to 9, 11, 13 and 15) and of its code (2 to 10); all tests of residues use these."""
OPERAND_RANGES = (10, 30, 50, 100)
RESULT_RANGES = (10, 30, 50)
SEVERAL = (2, 4)
"""A multi-result neuron answers to so many results, from the fewest to the most."""
SEVERAL_COVERAGE = 0.95
PATTERNS = 5
PATTERN_SUPPORT = 0.1
"""A neuron's patterns of a number are the most frequent ones among its top prompts, those that a tenth of them have."""
KINDS = ("range", "both ranges", "modulo", "both modulo", "pattern", "value", "identical", "multi-result")


@dataclass(frozen=True, eq=False)
class Heuristics:
    """Declared heuristics, and the prompts that each is about.

    ``tops`` says how many of a map's highest prompts are compared with a heuristic; ``on_result`` whether it is about
    the result, and so matched on key-value maps, or about the operands, and so matched on key maps.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    on_result: Bool[Tensor, " heuristics"]
    members: Bool[Tensor, "heuristics rows"]
    tops: Int[Tensor, " heuristics"]

    @property
    def base(self) -> Float[Tensor, " heuristics"]:
        """Share of the prompts that each heuristic is about: the score of a map without structure."""
        return self.members.float().mean(1)


@dataclass(frozen=True, eq=False)
class Matches:
    """How well each neuron's maps match each heuristic.

    ``score`` is the share of the top prompts that a heuristic is about (Nikankin et al. call 0.6 a match);
    ``corrected`` is (score - base) / (1 - base). A multi-result heuristic is each neuron's own: ``several`` has the
    prompts of its results, ``several_corrected`` its corrected score (0 where it has none).
    """

    heuristics: Heuristics
    score: Float[Tensor, "neurons heuristics"]
    corrected: Float[Tensor, "neurons heuristics"]
    several: Bool[Tensor, "neurons rows"]
    several_corrected: Float[Tensor, " neurons"]

    def matched(self, threshold: float = 0.5) -> Bool[Tensor, "neurons heuristics"]:
        """Which declared heuristics each neuron matches, corrected for chance."""
        return self.corrected >= threshold

    def classified(self, threshold: float = 0.5) -> Bool[Tensor, " neurons"]:
        """Which neurons match any heuristic, multi-result ones included."""
        return self.matched(threshold).any(1) | (self.several_corrected >= threshold)

    def classified_raw(self, threshold: float = 0.6) -> Bool[Tensor, " neurons"]:
        """Which neurons match any declared heuristic by the score that is not corrected for chance."""
        return (self.score >= threshold).any(1)

    def of_kind(self, kind: str, threshold: float = 0.5) -> Bool[Tensor, " neurons"]:
        """Which neurons match a heuristic of one of ``KINDS``."""
        if kind == "multi-result":
            return self.several_corrected >= threshold
        chosen = torch.tensor([k == kind for k in self.heuristics.kinds], device=self.score.device)
        return (self.matched(threshold) & chosen).any(1)

    def names_of(self, neuron: int, threshold: float = 0.5) -> tuple[str, ...]:
        """The heuristics that one neuron matches, best first."""
        scores = self.corrected[neuron]
        order = scores.argsort(descending=True)[: int((scores >= threshold).sum())]
        found = [self.heuristics.names[i] for i in order.tolist()]
        return (*found, *(["multi-result"] if float(self.several_corrected[neuron]) >= threshold else []))

    def associated(self, threshold: float = 0.5) -> Float[Tensor, "rows neurons"]:
        """How many of the heuristics that a neuron matches are about a prompt."""
        declared = self.heuristics.members.float().T @ self.matched(threshold).float().T
        return declared + (self.several & (self.several_corrected >= threshold)[:, None]).float().T


def declare(
    operands: Int[Tensor, "rows 2"],
    results: Int[Tensor, " rows"],
    *,
    moduli: Sequence[int] = MODULI,
    operand_ranges: Sequence[int] = OPERAND_RANGES,
    result_ranges: Sequence[int] = RESULT_RANGES,
) -> Heuristics:
    """Return the heuristics that some prompts allow, with the prompts that each is about.

    For either operand, both operands at once, and the result: ranges (which begin every third of their length, but no
    closer than ten), residues, and for single numbers decimal patterns such as ``.5.``, ``..8`` or ``1.2`` and whole
    values; and identical operands. As many top prompts are looked at as the heuristic is about, or, for patterns and
    values, as there are prompts for each first operand. Which patterns a neuron may match is read off its own top
    prompts, by ``match``.
    Heuristics about no prompt, about all, or about less than half as many as are looked at are left out.

    Raises:
        BadInput: there are no prompts, or results and operands differ in number.

    Source: Nikankin et al. 2025 (arXiv 2410.21272), algorithm 1 and appendix E; ranges of both operands and the numbers
        of top prompts as in technion-cs-nlp/llm-arithmetic-heuristics, heuristics_classification.py. We take the size
        of a residue class where that approximates it.
    """
    if len(operands) == 0 or len(operands) != len(results):
        raise BadInput(f"{len(operands)} operand pairs and {len(results)} results: expected as many, at least one")
    a, b = operands[:, 0], operands[:, 1]
    per_value = max(1, round(len(operands) / len(a.unique())))
    found: list[tuple[str, str, Tensor, int | None]] = []
    for name, numbers in (("a", (a,)), ("b", (b,)), ("a and b", (a, b)), ("result", (results,))):
        both = "both " if len(numbers) > 1 else ""
        high = int(max(x.max() for x in numbers)) + 1
        for length in result_ranges if name == "result" else operand_ranges:
            low = min(0, int(numbers[0].min()) // 10 * 10)
            for first in range(low, high, max(length // 3, 10)):
                inside = torch.stack([(x >= first) & (x < first + length) for x in numbers]).all(0)
                found.append((f"{name} in {first} to {first + length - 1}", f"{both}range{both and 's'}", inside, None))
        for m in moduli:
            for r in range(m):
                equal = torch.stack([x % m == r for x in numbers]).all(0)
                found.append((f"{name} = {r} mod {m}", f"{both}modulo", equal, None))
        if not both:
            found += [
                (f"{name} is {pattern}", "pattern" if "." in pattern else "value", members, per_value)
                for pattern, members in decimal_patterns(numbers[0]).items()
            ]
    found.append(("a = b", "identical", a == b, None))
    sizes = torch.stack([members.sum() for _, _, members, _ in found])
    tops = torch.tensor([int(s) if top is None else top for s, (*_, top) in zip(sizes, found, strict=True)])
    keep = (sizes.cpu() > 0) & (sizes.cpu() < len(operands)) & (sizes.cpu() * 2 >= tops)
    kept = [entry for entry, k in zip(found, keep.tolist(), strict=True) if k]
    return Heuristics(
        names=tuple(name for name, *_ in kept),
        kinds=tuple(kind for _, kind, *_ in kept),
        on_result=torch.tensor([name.startswith("result") for name, *_ in kept], device=operands.device),
        members=torch.stack([members for _, _, members, _ in kept]),
        tops=tops[keep].to(operands.device),
    )


def decimal_patterns(numbers: Int[Tensor, " rows"]) -> dict[str, Bool[Tensor, " rows"]]:
    """Return the prompts whose number has each decimal pattern, dots for any digit.

    Patterns whose numbers are a single run are ranges and left out. Of patterns that are about the same prompts, the
    most specific one stays.
    """
    size = numbers.abs()
    width = len(str(int(size.max())))
    texts = {value: str(value).zfill(width) for value in size.unique().tolist()}
    values_of: dict[str, set[int]] = {}
    for value, text in texts.items():
        for mask in range(1, 2**width):
            pattern = "".join(digit if mask >> i & 1 else "." for i, digit in enumerate(text))
            values_of.setdefault(pattern, set()).add(value)
    specific: dict[frozenset[int], str] = {}
    for pattern, values in sorted(values_of.items(), key=lambda item: item[0].count(".")):
        if "." not in pattern or max(values) - min(values) >= len(values):
            specific.setdefault(frozenset(values), pattern)
    lookup = torch.arange(int(size.max()) + 1, device=numbers.device)
    return {
        pattern: torch.isin(lookup, torch.tensor(sorted(values), device=numbers.device))[size]
        for values, pattern in specific.items()
    }


@dataclass(frozen=True, eq=False)
class Ranks:
    """For each prompt and neuron, how many prompts are strictly higher, and how many are as high (itself included)."""

    above: Float[Tensor, "rows neurons"]
    tied: Float[Tensor, "rows neurons"]

    def top(self, k: int) -> Float[Tensor, "rows neurons"]:
        """The chance of each prompt to be among the top k when ties are drawn at random."""
        return (k - self.above).div_(self.tied).clamp_(0, 1)

    def reversed(self) -> Ranks:
        """The ranks of the negated maps."""
        return Ranks(len(self.above) - self.above - self.tied, self.tied)


def ranks(maps: Float[Tensor, "rows neurons"]) -> Ranks:
    """Return the ranks of each neuron's prompts, highest first, with ties.

    Most of a ReLU neuron's map is zero, and any order of these prompts would look like a range of the first operand.
    """
    ordered, order = maps.T.contiguous().sort(dim=1, descending=True)
    n = ordered.shape[1]
    place = torch.arange(n, device=maps.device).expand_as(ordered)
    changes = ordered[:, 1:] != ordered[:, :-1]
    first = torch.nn.functional.pad(changes, (1, 0), value=True)
    last = torch.nn.functional.pad(changes, (0, 1), value=True)
    begin = torch.where(first, place, 0).cummax(1).values
    end = torch.where(last, place, n).flip(1).cummin(1).values.flip(1)
    above = torch.empty_like(ordered).scatter_(1, order, begin.to(ordered))
    tied = torch.empty_like(ordered).scatter_(1, order, (end - begin + 1).to(ordered))
    return Ranks(above.T.contiguous(), tied.T.contiguous())


def _shares(
    found: Ranks, members: Bool[Tensor, "heuristics rows"], tops: Int[Tensor, " heuristics"]
) -> Float[Tensor, "neurons heuristics"]:
    """Share of each neuron's top prompts that each heuristic is about: one matrix product for each number of them."""
    out = torch.zeros(found.above.shape[1], len(members), device=found.above.device)
    for k in tops.unique().tolist():
        mine = tops == k
        out[:, mine] = (members[mine].float() @ found.top(k)).T / k
    return out


def match(
    keys: Float[Tensor, "rows neurons"] | Ranks,
    key_values: Float[Tensor, "rows neurons"],
    operands: Int[Tensor, "rows 2"],
    results: Int[Tensor, " rows"],
    *,
    heuristics: Heuristics | None = None,
    both_ends: bool = False,
) -> Matches:
    """Return how well neurons match heuristics, from their activation maps over prompts.

    Heuristics on operands are matched on key maps, those on the result on key-value maps. Ties count by the chance of
    each prompt to be among the top ones. Decimal patterns are each neuron's own: those of ``own_patterns``.

    Args:
        keys: each neuron's activation on each prompt, or the ranks of these.
        key_values: its contribution to the logit of the right result: the activation times W_out W_U there.
        operands: the two numbers of each prompt.
        results: the right result of each prompt.
        heuristics: what to match; ``declare(operands, results)`` where it is None.
        both_ends: match the lowest activations too and take the better score, for neurons that go below zero.

    Raises:
        BadInput: the maps do not have one row for each prompt, or hold numbers that are not finite.

    Source: Nikankin et al. 2025 (arXiv 2410.21272), algorithm 1 and section 4.1; which maps decide which heuristics:
        technion-cs-nlp/llm-arithmetic-heuristics, heuristics_classification.py (the mode "HYBRID").
    """
    shape = tuple((keys.above if isinstance(keys, Ranks) else keys).shape)
    if shape != tuple(key_values.shape) or len(key_values) != len(operands):
        raise BadInput(f"maps {shape} and {tuple(key_values.shape)} of {len(operands)} prompts do not fit together")
    if not all(bool(torch.isfinite(x).all()) for x in (keys, key_values) if isinstance(x, Tensor)):
        raise BadInput("the activation maps hold numbers that are not finite")
    found = heuristics or declare(operands, results)
    key_ranks, value_ranks = keys if isinstance(keys, Ranks) else ranks(keys), ranks(key_values)
    score = torch.zeros(shape[1], len(found.names), device=key_values.device)
    on_operands = ~found.on_result
    members, tops = found.members[on_operands], found.tops[on_operands]
    score[:, on_operands] = _shares(key_ranks, members, tops)
    if both_ends:
        score[:, on_operands] = score[:, on_operands].maximum(_shares(key_ranks.reversed(), members, tops))
    score[:, found.on_result] = _shares(value_ranks, found.members[found.on_result], found.tops[found.on_result])
    score = torch.where(own_patterns(found, score), score, 0.0)
    base = found.base
    several, several_corrected = _several(
        value_ranks, results, max(1, round(len(operands) / len(operands[:, 0].unique())))
    )
    return Matches(found, score, (score - base) / (1 - base), several, several_corrected)


def own_patterns(
    heuristics: Heuristics, support: Float[Tensor, "neurons heuristics"]
) -> Bool[Tensor, "neurons heuristics"]:
    """Return which heuristics each neuron may match: all but decimal patterns that are not read off its top prompts.

    Of each number (a, b, the result) these are the five patterns that most of the neuron's top prompts have, if a tenth
    of them or more do.

    Args:
        heuristics: what was declared.
        support: share of each neuron's top prompts that each heuristic is about.

    Source: technion-cs-nlp/llm-arithmetic-heuristics, heuristics_classification.py: the five most frequent patterns
        among the top prompts, with a support of 10 %.
    """
    allowed = torch.ones_like(support, dtype=torch.bool)
    for number in ("a", "b", "result"):
        mine = [
            i
            for i, (name, kind) in enumerate(zip(heuristics.names, heuristics.kinds, strict=True))
            if kind == "pattern" and name.startswith(f"{number} is ")
        ]
        if mine:
            shares = support[:, mine]
            least = shares.topk(min(PATTERNS, len(mine)), dim=1).values[:, -1:].clamp_min(PATTERN_SUPPORT)
            allowed[:, mine] = shares >= least
    return allowed


def _several(
    found: Ranks, results: Int[Tensor, " rows"], top: int
) -> tuple[Bool[Tensor, "neurons rows"], Float[Tensor, " neurons"]]:
    """The prompts of the few results that cover a neuron's top prompts, and the coverage corrected for chance.

    Source: is_multi_result_neuron in technion-cs-nlp/llm-arithmetic-heuristics; two to four results as in the paper.
    """
    values, index = results.unique(return_inverse=True)
    one_hot = torch.nn.functional.one_hot(index, len(values)).float()
    top = min(top, len(results))
    share, order = ((one_hot.T @ found.top(top)).T / top).sort(dim=1, descending=True)
    coverage = share.cumsum(1)
    count = (coverage < SEVERAL_COVERAGE).sum(1) + 1
    # A result that no top prompt has belongs to nobody's few.
    few = (count >= SEVERAL[0]) & (count <= SEVERAL[1])
    chosen = torch.arange(len(values), device=results.device)[None] < count[:, None]
    inside = torch.zeros_like(share).scatter(1, order, chosen.float())
    base = inside @ one_hot.mean(0)
    reached = coverage.gather(1, count.clamp_max(len(values))[:, None] - 1).squeeze(1)
    corrected = torch.where(few & (base < 1), (reached - base) / (1 - base).clamp_min(1e-6), 0.0)
    return (inside[:, index] > 0) & few[:, None], corrected
