"""Word problems: the product of the elements of a group so far."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.tasks.arithmetic.operand_square import check_integer, check_name
from circuits.tasks.games.base import Symmetry
from circuits.tasks.games.engine import MOST_TOKENS, Engine

Permutation = tuple[int, ...]

DEGREES = {"S3": 3, "A5": 5}
"""How many things the permutations of each group permute."""

GENERATORS: dict[str, tuple[Permutation, Permutation]] = {
    "S3": ((1, 0, 2), (1, 2, 0)),
    "A5": ((1, 2, 3, 4, 0), (1, 2, 0, 3, 4)),
}
"""Two elements of each group of which all others are products."""

TOKENS = ("elements", "generators")


@dataclass(frozen=True)
class GroupWord(Engine):
    """A token is an element of the group, and the state is the product of all tokens so far, the first on the left.

    A product of permutations applies the right one first. Every token is always legal and the word never ends, so
    legality says nothing of the state. A state is the element's place in the list of all, in order of what they make
    of 0, 1, ...

    Attributes:
        group: ``S3`` (6 elements) or ``A5`` (60, no solvable shortcut).
        tokens: ``elements`` (all of them) or ``generators`` (two).
        length: number of tokens of a sequence.

    Raises:
        BadInput: the length is out of range.
        UnknownName: there is no such group, or no such kind of tokens.

    Source: Liu et al. 2023 (arXiv 2210.10749) and Li et al. 2025 (arXiv 2503.02854), who use both groups.
    """

    name: ClassVar[str] = "group-word"
    ends: ClassVar[bool] = False

    group: str = "S3"
    tokens: str = "elements"
    length: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("group", self.group, tuple(DEGREES))
        check_name("kind of tokens", self.tokens, TOKENS)
        check_integer("length", self.length, 1, MOST_TOKENS)

    @functools.cached_property
    def elements(self) -> tuple[Permutation, ...]:
        """The group as permutations, in ascending order; the identity is the first."""
        everything = itertools.permutations(range(DEGREES[self.group]))
        return tuple(p for p in everything if self.group.startswith("S") or not _is_odd(p))

    @functools.cached_property
    def _places(self) -> dict[Permutation, int]:
        return {element: place for place, element in enumerate(self.elements)}

    @functools.cached_property
    def products(self) -> Int[Tensor, "n_elements n_elements"]:
        """The product of each element with each, the rows on the left."""
        return torch.tensor([[self._places[_product(a, b)] for b in self.elements] for a in self.elements])

    @functools.cached_property
    def _factors(self) -> Int[Tensor, " n_actions"]:
        """The element that each token is."""
        chosen = self.elements if self.tokens == "elements" else GENERATORS[self.group]
        return torch.tensor([self._places[element] for element in chosen])

    @functools.cached_property
    def moves(self) -> tuple[str, ...]:
        """What each permutation makes of 0, 1, ..."""
        return tuple("".join(map(str, self.elements[place])) for place in self._factors.tolist())

    @property
    def n_ctx(self) -> int:
        """Number of tokens of a sequence."""
        return self.length

    @property
    def start(self) -> tuple[int, ...]:
        """The identity."""
        return (0,)

    @property
    def _has_odd(self) -> bool:
        return any(map(_is_odd, self.elements))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The element and, where the group has odd ones, its parity."""
        return ("element", "parity") if self._has_odd else ("element",)

    @property
    def feature_sizes(self) -> tuple[int, ...]:
        """What each feature can be."""
        return (len(self.elements), 2) if self._has_odd else (len(self.elements),)

    def allowed(self, states: Int[Tensor, "batch 1"]) -> Bool[Tensor, "batch n_actions"]:
        """Every token."""
        return torch.ones(len(states), self.n_actions, dtype=torch.bool, device=states.device)

    def move(self, states: Int[Tensor, "batch 1"], tokens: Int[Tensor, " batch"]) -> Int[Tensor, "batch 1"]:
        """The product with each token."""
        factors = self._factors.to(states.device)[tokens]
        return self.products.to(states.device)[states[:, 0], factors][:, None]

    def state_id(self, states: Int[Tensor, "batch 1"]) -> Int[Tensor, " batch"]:
        """The element's place."""
        return states[:, 0]

    def state_features(self, states: Int[Tensor, "batch 1"]) -> Int[Tensor, "batch n_features"]:
        """The element and, where the group has odd ones, its parity."""
        if not self._has_odd:
            return states
        odd = torch.tensor([_is_odd(element) for element in self.elements], device=states.device)
        return torch.cat((states, odd.long()[states]), 1)

    def state_of(self, features: Int[Tensor, "batch n_features"]) -> Int[Tensor, "batch 1"]:
        """The element."""
        return features[:, :1]

    @property
    def outcome_names(self) -> tuple[str, ...]:
        """The elements."""
        return tuple("".join(map(str, element)) for element in self.elements)

    def outcome(self, states: Int[Tensor, "batch 1"]) -> Int[Tensor, " batch"]:
        """The product of the whole word."""
        return states[:, 0]

    def describe(self, state: Int[Tensor, " 1"]) -> str:
        """The element as a permutation."""
        return f"product {''.join(map(str, self.elements[int(state[0])]))}"

    def picture(self, state: Int[Tensor, " 1"]) -> tuple[tuple[str, ...], ...]:
        """What the product makes of 0, 1, ..."""
        return (tuple(map(str, self.elements[int(state[0])])),)

    def symmetries(self) -> tuple[Symmetry, ...]:
        """Conjugations by permutations that keep the set of tokens, then products from the left with an element.

        The former keep the start; the latter leave the tokens as they are and move the start.
        """
        conjugations = [self._conjugation(by) for by in itertools.permutations(range(DEGREES[self.group]))]
        translations = [self._translation(place) for place in range(1, len(self.elements))]
        return (*(found for found in conjugations if found is not None), *translations)

    def _conjugation(self, by: Permutation) -> Symmetry | None:
        inverse = tuple(by.index(i) for i in range(len(by)))
        images = [self._places[_product(_product(by, element), inverse)] for element in self.elements]
        factors = self._factors.tolist()
        if not all(images[factor] in factors for factor in factors):
            return None
        image, tokens = torch.tensor(images), torch.tensor([factors.index(images[factor]) for factor in factors])
        name = "identity" if by == tuple(range(len(by))) else f"conjugated by {''.join(map(str, by))}"
        return Symmetry(name, tokens, lambda states: image.to(states.device)[states], True)

    def _translation(self, place: int) -> Symmetry:
        image = self.products[place]
        name = f"{''.join(map(str, self.elements[place]))} from the left"
        return Symmetry(name, torch.arange(self.n_actions), lambda states: image.to(states.device)[states], False)

    def planted_heuristic(self) -> Anything:
        """The rule that everything is legal, which keeps nothing and is right everywhere."""
        return Anything(self.d_vocab)


@dataclass(frozen=True)
class Anything:
    """Every token is legal: the rule keeps nothing of the past, and is right everywhere."""

    d_vocab: int

    @property
    def keeps(self) -> str:
        """What the rule keeps of the past, in words."""
        return "nothing"

    def __call__(self, tokens: Int[Tensor, "n length"]) -> Bool[Tensor, "n positions d_vocab"]:
        """The tokens that the rule takes for legal before the first token and after each."""
        shape = (len(tokens), tokens.shape[1] + 1, self.d_vocab)
        return torch.ones(shape, dtype=torch.bool, device=tokens.device)


def _product(a: Permutation, b: Permutation) -> Permutation:
    """The permutation that applies b, then a."""
    return tuple(a[i] for i in b)


def _is_odd(p: Permutation) -> bool:
    return sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p))) % 2 == 1
