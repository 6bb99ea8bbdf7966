"""A walk on a line with a wall at each end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games.base import Symmetry
from circuits.tasks.games.engine import MOST_TOKENS, Engine

LARGEST_SIZE = 64


@dataclass(frozen=True)
class Lattice(Engine):
    """Positions 0 to size - 1 in a line; the moves are ``L``, ``stay`` and ``R``, and no move goes through a wall.

    The walk starts at 0 and never ends. Whatever the size, states have only three different sets of legal moves: at the
    left wall, at the right wall, in between. The state is the position, and so is its id.

    Attributes:
        size: number of positions, from 2 to 64.
        length: number of moves of a sequence; None is six for each step from wall to wall.

    Raises:
        BadInput: a parameter is out of range.

    Source: Vafa et al. 2025 (arXiv 2507.06952), section 3.1 (sizes 2 to 5, 100 moves).
    """

    name: ClassVar[str] = "lattice"
    ends: ClassVar[bool] = False

    size: int = 5
    length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("size", self.size, 2, LARGEST_SIZE)
        if self.length is not None:
            check_integer("length", self.length, 1, MOST_TOKENS)

    @property
    def moves(self) -> tuple[str, ...]:
        """One to the left, none, one to the right."""
        return ("L", "stay", "R")

    @property
    def n_ctx(self) -> int:
        """Number of moves of a sequence."""
        return 6 * (self.size - 1) if self.length is None else self.length

    @property
    def start(self) -> tuple[int, ...]:
        """The left wall."""
        return (0,)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The position."""
        return ("position",)

    @property
    def feature_sizes(self) -> tuple[int, ...]:
        """The number of positions."""
        return (self.size,)

    def allowed(self, states: Int[Tensor, "batch 1"]) -> Bool[Tensor, "batch 3"]:
        """Every move that stays on the line."""
        position = states[:, 0]
        return torch.stack((position > 0, torch.ones_like(position, dtype=torch.bool), position < self.size - 1), 1)

    def move(self, states: Int[Tensor, "batch 1"], tokens: Int[Tensor, " batch"]) -> Int[Tensor, "batch 1"]:
        """The position after each move."""
        return states + tokens[:, None] - 1

    def state_id(self, states: Int[Tensor, "batch 1"]) -> Int[Tensor, " batch"]:
        """The position."""
        return states[:, 0]

    def state_features(self, states: Int[Tensor, "batch 1"]) -> Int[Tensor, "batch 1"]:
        """The position."""
        return states

    def state_of(self, features: Int[Tensor, "batch 1"]) -> Int[Tensor, "batch 1"]:
        """The position."""
        return features

    @property
    def outcome_names(self) -> tuple[str, ...]:
        """The positions."""
        return tuple(f"position {position}" for position in range(self.size))

    def outcome(self, states: Int[Tensor, "batch 1"]) -> Int[Tensor, " batch"]:
        """Where the walk ended."""
        return states[:, 0]

    def changed_rules(self) -> Lattice | None:
        """The right wall one position nearer, the walk as long; None where that leaves no way to go."""
        return None if self.size == 2 else Lattice(self.size - 1, self.n_ctx)

    def describe(self, state: Int[Tensor, " 1"]) -> str:
        """The position in words."""
        return f"position {int(state[0])} of 0 to {self.size - 1}"

    def picture(self, state: Int[Tensor, " 1"]) -> tuple[tuple[str, ...], ...]:
        """The line, with the walker on it."""
        return (tuple("●" if place == int(state[0]) else "" for place in range(self.size)),)

    def symmetries(self) -> tuple[Symmetry, ...]:
        """The identity, and the reflection that exchanges the walls, which does not keep the start."""
        return (
            Symmetry("identity", torch.arange(3), lambda states: states, True),
            Symmetry("reflection", torch.arange(2, -1, -1), lambda states: self.size - 1 - states, False),
        )

    def planted_heuristic(self) -> WallDetector:
        """A wall detector, which counts the steps from each wall no farther than half way."""
        return WallDetector(self, max(1, (self.size - 1) // 2))


@dataclass(frozen=True)
class WallDetector:
    """Legal is ``stay``, and a step towards a wall as long as the count of steps from it is not 0.

    It keeps two counts, of the steps from the left wall and from the right one, and neither goes beyond ``reach``. So
    no count is ever larger than the distance, and what it takes for legal always is; but in the middle it forgets how
    far it went, and on the way back takes a wall to be nearer than it is. With a reach of half the way (2, 4 and 8
    steps) its set is exactly right at 73 %, 85 % and 93 % of the positions of uniform play on 5, 9 and 17 positions;
    of those between the walls, it leaves the best guess of the position right at 61 %, 63 % and 77 %.

    Attributes:
        game: the lattice.
        reach: largest count, from 1; one less than the size would be the whole state.

    Raises:
        BadInput: the reach is out of range.

    Source: ours; counts that saturate are those of branch predictors (Smith 1981).
    """

    game: Lattice
    reach: int

    def __post_init__(self) -> None:
        check_integer("reach", self.reach, 1, self.game.size - 1)

    @property
    def keeps(self) -> str:
        """What the rule keeps of the past, in words."""
        return f"the steps from each wall, counted up to {self.reach}"

    def __call__(self, tokens: Int[Tensor, "n length"]) -> Bool[Tensor, "n positions 3"]:
        """The tokens that the rule takes for legal before the first token and after each."""
        left = tokens.new_zeros(len(tokens))
        right = torch.full_like(left, self.reach)
        legal = [self._legal(left, right)]
        for step in (tokens - 1).unbind(1):
            left, right = (left + step).clamp(0, self.reach), (right - step).clamp(0, self.reach)
            legal.append(self._legal(left, right))
        return torch.stack(legal, 1)

    @staticmethod
    def _legal(left: Tensor, right: Tensor) -> Tensor:
        return torch.stack((left > 0, torch.ones_like(left, dtype=torch.bool), right > 0), 1)
