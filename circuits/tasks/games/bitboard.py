"""Boards of up to 64 cells, the stones of a player in the bits of one integer: what connect3 and othello share.

Cell ``row * columns + column`` is the bit of that place. With 64 cells the last one is the sign, which shifts to the
right copy: every shift is cut to the cells that it can arrive at, and those leave the copies out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.errors import BadInput

STEPS = ((0, 1), (1, -1), (1, 0), (1, 1))
"""Rows and columns that one step goes, in the four directions of which the others are the opposites."""

Shift = Callable[[Tensor], Tensor]


def bits_of(cells: Bool[Tensor, "*batch n_cells"]) -> Int[Tensor, "*batch"]:
    """The integer that has the bits of the given cells."""
    places = torch.arange(cells.shape[-1], device=cells.device)
    return (cells.long() << places).sum(-1)


@dataclass(frozen=True)
class Bitboard:
    """A board of so many rows and columns, and what can be asked of the stones on it."""

    rows: int
    columns: int

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.rows * self.columns

    @functools.cached_property
    def bits(self) -> Int[Tensor, " n_cells"]:
        """The integer of each cell alone."""
        return torch.ones(self.n_cells, dtype=torch.int64) << torch.arange(self.n_cells)

    @functools.cached_property
    def _shifts(self) -> tuple[Tensor, Tensor, Tensor]:
        places = torch.arange(self.n_cells)
        rows, columns = places // self.columns, places % self.columns
        by: list[int] = []
        forward: list[Tensor] = []
        backward: list[Tensor] = []
        for down, right in STEPS:
            by.append(down * self.columns + right)
            for arrivals, sign in ((forward, -1), (backward, 1)):
                row, column = rows + sign * down, columns + sign * right
                inside = (row >= 0) & (row < self.rows) & (column >= 0) & (column < self.columns)
                arrivals.append(bits_of(inside))
        return torch.tensor(by)[:, None], torch.stack(forward)[:, None], torch.stack(backward)[:, None]

    def shifts(self, device: torch.device) -> tuple[Shift, Shift]:
        """Two functions that move stones one step: in the four directions of ``STEPS``, and in the opposite ones."""
        by, forward, backward = (tensor.to(device) for tensor in self._shifts)
        return (lambda stones: (stones << by) & forward), (lambda stones: (stones >> by) & backward)

    def cells(self, stones: Int[Tensor, " batch"]) -> Bool[Tensor, "batch n_cells"]:
        """Which cells have stones."""
        return (stones[:, None] & self.bits.to(stones.device)) != 0

    def has_run(self, stones: Int[Tensor, " batch"], length: int) -> Bool[Tensor, " batch"]:
        """Whether so many stones stand in a row, in any direction."""
        forward, _ = self.shifts(stones.device)
        run = stones.expand(len(STEPS), -1)
        for _ in range(length - 1):
            run = forward(run) & stones
        return (run != 0).any(0)

    def reaching(self, own: Int[Tensor, " batch"], other: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The empty cells from which a straight line of stones of ``other`` leads to one of ``own``."""
        found = torch.zeros_like(own)
        for shift in self.shifts(own.device):
            line = shift(own.expand(len(STEPS), -1)) & other
            for _ in range(max(self.rows, self.columns) - 3):
                line = line | (shift(line) & other)
            found = found | _any_of(shift(line))
        return found & ~(own | other)

    def enclosed(
        self, placed: Int[Tensor, " batch"], own: Int[Tensor, " batch"], other: Int[Tensor, " batch"], longest: int
    ) -> Int[Tensor, " batch"]:
        """The stones of ``other`` in lines of at most ``longest`` between the one placed and one of ``own``."""
        found = torch.zeros_like(own)
        for shift in self.shifts(own.device):
            line = shift(placed.expand(len(STEPS), -1)) & other
            for _ in range(longest - 1):
                line = line | (shift(line) & other)
            closed = (shift(line) & own) != 0
            found = found | _any_of(torch.where(closed, line, 0))
        return found

    def position_id(self, states: Int[Tensor, "batch 3"]) -> Int[Tensor, " batch"]:
        """A number for each position (own stones, other stones, player) that no other has.

        Where the bits of all three fit in 63, they stand side by side; else cells are digits to the base of three.

        Raises:
            BadInput: the board has more positions than 64 bits can number.
        """
        own, other, player = states.unbind(1)
        n = self.n_cells
        if 2 * n < 63:
            return own | other << n | player << 2 * n
        if 2 * 3**n >= 2**63:
            raise BadInput(
                f"a board of {n} cells has more positions than 64 bits can number: compare whole states, which "
                "are equal where positions are"
            )
        powers = 3 ** torch.arange(n, device=states.device)
        return ((self.cells(own) + 2 * self.cells(other).long()) * powers).sum(1) * 2 + player

    def features(self, states: Int[Tensor, "batch 3"]) -> Int[Tensor, "batch n_cells"]:
        """Each cell as the player to move sees it: 0 empty, 1 own, 2 the other's."""
        return self.cells(states[:, 0]).long() + 2 * self.cells(states[:, 1])

    def changed(self, before: Int[Tensor, "batch 3"], after: Int[Tensor, "batch 3"]) -> Bool[Tensor, "batch n_cells"]:
        """The cells on which something else stands, whoever looks at them."""
        same_view = (before[:, 2] == after[:, 2])[:, None]
        seen = torch.where(same_view, before[:, :2], before[:, :2].flip(1))
        return self.features(torch.cat((seen, after[:, 2:]), 1)) != self.features(after)

    def from_features(self, features: Int[Tensor, "batch n_cells"]) -> Int[Tensor, "batch 3"]:
        """The position whose ``features`` these are; player 0 is to move where the number of stones is even."""
        own, other = bits_of(features == 1), bits_of(features == 2)
        return torch.stack((own, other, (features != 0).sum(1) % 2), 1)

    def moved(self, states: Int[Tensor, "batch 3"], images: Int[Tensor, " n_cells"]) -> Int[Tensor, "batch 3"]:
        """The positions with what stands on each cell on its image instead."""
        image = self.bits[images].to(states.device)
        own, other = (torch.where(self.cells(states[:, side]), image, 0).sum(1) for side in (0, 1))
        return torch.stack((own, other, states[:, 2]), 1)

    def draw(self, state: Int[Tensor, " 3"], *, last_row_first: bool = False) -> str:
        """A position as text, with X for the player who began; rows are parted by a slash."""
        lines = ["".join(cell or "." for cell in row) for row in self.picture(state, last_row_first=last_row_first)]
        return f"{'/'.join(lines)} {'XO'[int(state[2])]} to move"

    def picture(self, state: Int[Tensor, " 3"], *, last_row_first: bool) -> tuple[tuple[str, ...], ...]:
        """A position as rows of cells, with X for the player who began."""
        own, other = (self.cells(state[None, side])[0].tolist() for side in (0, 1))
        marks = "XO" if int(state[2]) == 0 else "OX"
        cells = [marks[0] if mine else marks[1] if theirs else "" for mine, theirs in zip(own, other, strict=True)]
        rows = [tuple(cells[row * self.columns : (row + 1) * self.columns]) for row in range(self.rows)]
        return tuple(rows[::-1] if last_row_first else rows)


def square_images(size: int) -> dict[str, Int[Tensor, " n_cells"]]:
    """The image of each cell of a square under its eight symmetries, by name, the identity first."""
    cells = torch.arange(size * size).view(size, size)
    turned = {f"turned {90 * quarter}": cells.rot90(quarter) for quarter in range(1, 4)}
    mirrored = {f"{name}, mirrored": image.flip(1) for name, image in turned.items()}
    images = {"identity": cells, **turned, "mirrored": cells.flip(1), **mirrored}
    return {name: image.flatten() for name, image in images.items()}


def _any_of(stones: Int[Tensor, "4 batch"]) -> Int[Tensor, " batch"]:
    return stones[0] | stones[1] | stones[2] | stones[3]
