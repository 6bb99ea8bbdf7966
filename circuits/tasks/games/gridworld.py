"""Ways through a small town: from a cell to another, around the walls between."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.tasks.arithmetic.operand_square import check_integer, check_name
from circuits.tasks.games.base import Symmetry, cell_names
from circuits.tasks.games.bitboard import square_images
from circuits.tasks.games.engine import MOST_TOKENS, Engine
from circuits.tasks.games.last_tokens import LastTokens

SIZES = (5, 7)
LAYOUTS = ("walls", "mirrored", "open")

DIRECTIONS = {"N": (-1, 0), "E": (0, 1), "S": (1, 0), "W": (0, -1)}
"""Rows and columns that a move goes; row 0 is the northernmost."""

HALF_OF_THE_WALLS = {
    5: ((0, 1, "E"), (1, 1, "E"), (1, 0, "S"), (1, 3, "S")),
    7: ((0, 2, "E"), (1, 2, "E"), (2, 0, "S"), (2, 1, "S"), (2, 3, "S"), (1, 4, "S"), (1, 5, "S"), (4, 1, "E")),
}
"""Row, column and side of walls; the others are these turned by half."""


@dataclass(frozen=True)
class Gridworld(Engine):
    """A start cell, another cell as the goal, then moves ``N``, ``E``, ``S`` and ``W`` until the goal is reached.

    Every cell is open; walls stand between cells. The first two tokens are cells. A state is the cell where one is and
    the goal, each ``size * size`` as long as it is not chosen; there is one before both, one for each start, and one
    for each pair of cells, the game over where both are the same. A walk that does not reach its goal in time is cut.

    Attributes:
        size: 5 or 7 cells a side.
        layout: ``walls``, ``mirrored`` (the same walls in a mirror: a change of the rules) or ``open`` (none).
        length: number of tokens of a sequence; None is two cells and six moves for each cell of a side.

    Raises:
        BadInput: a parameter is out of range.
        UnknownName: there is no such layout.

    Source: Vafa et al. 2024 (arXiv 2406.03689), section 4.1, on a small map: origin, destination, moves, end.
    """

    name: ClassVar[str] = "gridworld"
    best_policy: ClassVar[str | None] = "shortest-path"

    size: int = 5
    layout: str = "walls"
    length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.size, bool) or self.size not in SIZES:
            raise BadInput(f"size = {self.size!r}: expected one of {', '.join(map(str, SIZES))}")
        check_name("layout", self.layout, LAYOUTS)
        if self.length is not None:
            check_integer("length", self.length, 3, MOST_TOKENS)

    @property
    def n_cells(self) -> int:
        """Number of cells, which also stands for a cell that is not chosen."""
        return self.size * self.size

    @functools.cached_property
    def moves(self) -> tuple[str, ...]:
        """The directions, then the cells, row by row."""
        return (*DIRECTIONS, *cell_names(self.size, self.size))

    @property
    def n_ctx(self) -> int:
        """Number of tokens of a sequence."""
        return 2 + 6 * self.size if self.length is None else self.length

    @property
    def start(self) -> tuple[int, ...]:
        """Neither cell chosen."""
        return self.n_cells, self.n_cells

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The cell where one is, and the goal."""
        return "position", "goal"

    @property
    def feature_sizes(self) -> tuple[int, ...]:
        """The cells and, last, none."""
        return self.n_cells + 1, self.n_cells + 1

    @functools.cached_property
    def neighbours(self) -> Int[Tensor, "n_cells 4"]:
        """The cell that each direction leads to: the cell itself where a wall or the edge is in the way."""
        walls = self._walls()
        rows = []
        for cell in range(self.n_cells):
            row, column = divmod(cell, self.size)
            reached = []
            for down, right in DIRECTIONS.values():
                inside = 0 <= row + down < self.size and 0 <= column + right < self.size
                other = cell + down * self.size + right
                reached.append(other if inside and (cell, other) not in walls else cell)
            rows.append(reached)
        return torch.tensor(rows)

    def _walls(self) -> set[tuple[int, int]]:
        """The pairs of cells, both ways round, with a wall between."""
        if self.layout == "open":
            return set()
        walls = set()
        for row, column, side in HALF_OF_THE_WALLS[self.size]:
            down, right = DIRECTIONS[side]
            cell, other = row * self.size + column, (row + down) * self.size + column + right
            walls |= {(cell, other), (self.n_cells - 1 - cell, self.n_cells - 1 - other)}
        if self.layout == "mirrored":
            mirror = torch.arange(self.n_cells).view(self.size, self.size).flip(1).flatten().tolist()
            walls = {(mirror[cell], mirror[other]) for cell, other in walls}
        return walls | {(other, cell) for cell, other in walls}

    @functools.cached_property
    def distances(self) -> Int[Tensor, "n_cells n_cells"]:
        """The number of moves on a shortest way from each cell to each."""
        far = torch.full((self.n_cells, self.n_cells), self.n_cells)
        distances = far.fill_diagonal_(0)
        for _ in range(self.n_cells):
            # Where a wall is in the way, the neighbour is the cell itself and makes nothing shorter.
            distances = torch.minimum(distances, 1 + distances[self.neighbours].min(1).values)
        return distances

    def allowed(self, states: Int[Tensor, "batch 2"]) -> Bool[Tensor, "batch n_actions"]:
        """The start: any cell; the goal: any other; then every direction without a wall, until the goal is reached."""
        position, goal = states[:, :1], states[:, 1:]
        none = self.n_cells
        cells = torch.arange(none, device=states.device)
        choosing = (goal == none) & (cells != position)
        neighbours = self.neighbours.to(states.device)[position[:, 0].clamp_max(none - 1)]
        walking = (goal != none) & (position != goal) & (neighbours != position)
        return torch.cat((walking, choosing), 1)

    def move(self, states: Int[Tensor, "batch 2"], tokens: Int[Tensor, " batch"]) -> Int[Tensor, "batch 2"]:
        """Where each token leads, or what it chooses."""
        position, goal = states.unbind(1)
        none, n_sides = self.n_cells, len(DIRECTIONS)
        neighbours = self.neighbours.to(states.device)
        walked = neighbours[position.clamp_max(none - 1), tokens.clamp_max(n_sides - 1)]
        cell, walks, starts = tokens - n_sides, tokens < n_sides, position == none
        new_position = torch.where(walks, walked, torch.where(starts, cell, position))
        return torch.stack((new_position, torch.where(walks | starts, goal, cell)), 1)

    def distance(self, states: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
        """The number of moves on a shortest way to the goal, -1 where there is no goal yet."""
        position, goal = states.unbind(1)
        none = self.n_cells
        distances = self.distances.to(states.device)[position.clamp_max(none - 1), goal.clamp_max(none - 1)]
        return torch.where(goal == none, -1, distances)

    def best_moves(self, states: Int[Tensor, "batch 2"]) -> Bool[Tensor, "batch d_vocab"]:
        """The moves on a shortest way to the goal; any start, any goal."""
        position, goal = (column.clamp_max(self.n_cells - 1) for column in states.unbind(1))
        distances = self.distances.to(states.device)
        onwards = distances[self.neighbours.to(states.device)[position], goal[:, None]]
        nearer = onwards < distances[position, goal][:, None]
        legal = self.legal(states)
        n_sides = len(DIRECTIONS)
        return torch.cat((legal[:, :n_sides] & nearer, legal[:, n_sides:]), 1)

    def state_id(self, states: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
        """Both cells as the digits of one number."""
        return states[:, 0] * (self.n_cells + 1) + states[:, 1]

    def state_features(self, states: Int[Tensor, "batch 2"]) -> Int[Tensor, "batch 2"]:
        """The cell where one is, and the goal."""
        return states

    def state_of(self, features: Int[Tensor, "batch 2"]) -> Int[Tensor, "batch 2"]:
        """The cell where one is, and the goal."""
        return features

    @property
    def outcome_names(self) -> tuple[str, ...]:
        """Whether the goal was reached in time."""
        return ("not reached", "reached")

    def outcome(self, states: Int[Tensor, "batch 2"]) -> Int[Tensor, " batch"]:
        """1 where the goal was reached."""
        return ((states[:, 0] == states[:, 1]) & (states[:, 1] != self.n_cells)).long()

    def changed_rules(self) -> Gridworld | None:
        """The walls in a mirror; None where there are none."""
        other = {"walls": "mirrored", "mirrored": "walls"}.get(self.layout)
        return None if other is None else Gridworld(self.size, other, self.length)

    def describe(self, state: Int[Tensor, " 2"]) -> str:
        """Both cells by name."""
        position, goal = ((*self.moves[len(DIRECTIONS) :], "none")[cell] for cell in state.tolist())
        return f"at {position}, goal {goal}"

    def picture(self, state: Int[Tensor, " 2"]) -> tuple[tuple[str, ...], ...]:
        """The cells, with the walker and the goal on them."""
        position, goal = state.tolist()
        marks = {goal: "◎", position: "●"}
        cells = [marks.get(cell, "") for cell in range(self.n_cells)]
        return tuple(tuple(cells[row * self.size : (row + 1) * self.size]) for row in range(self.size))

    def symmetries(self) -> tuple[Symmetry, ...]:
        """Those of the eight of the square under which the walls stay as they are, the identity first."""
        found = []
        for name, image in square_images(self.size).items():
            sides = self._turned_sides(image)
            if torch.equal(self.neighbours[image][:, sides], image[self.neighbours]):
                found.append(self._symmetry(name, image, sides))
        return tuple(found)

    def _turned_sides(self, image: Int[Tensor, " n_cells"]) -> Int[Tensor, " 4"]:
        """The direction that each direction becomes."""
        middle = self.n_cells // 2
        steps = [down * self.size + right for down, right in DIRECTIONS.values()]
        return torch.tensor([steps.index(int(image[middle + step]) - middle) for step in steps])

    def _symmetry(self, name: str, image: Int[Tensor, " n_cells"], sides: Int[Tensor, " 4"]) -> Symmetry:
        n_sides = len(DIRECTIONS)
        tokens = torch.cat((sides, image + n_sides, torch.tensor([self.n_actions])))
        with_none = torch.cat((image, torch.tensor([self.n_cells])))
        return Symmetry(name, tokens, lambda states: with_none.to(states.device)[states], True)

    def planted_heuristic(self) -> LastTokens:
        """A memory of the way: what is certain to be legal after the last three tokens, whatever came before.

        It keeps those tokens, and that the sequence starts with them as long as they are all. So it knows that one can
        go back, and on again where one has just come from, and little else. What it takes for legal always is, but
        where the goal has just been reached, which it does not see. With walls its set is exactly the legal one at 22 %
        and 14 % of the positions of random walks on 5 and 7 cells a side, and at 58 % and 48 % of those of shortest
        paths. The most probable set after three tokens (``LastTokens(game, 3)``) is the legal one at twice as many of
        the former (46 % and 40 %), but does not play legally: a token drawn from it is illegal at 12 % and 16 %.
        """
        return LastTokens(self, window=3, certain=True)
