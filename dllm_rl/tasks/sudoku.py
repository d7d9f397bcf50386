"""4x4 Sudoku with unique solutions, split by solution grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal

from dllm_rl.errors import UserError
from dllm_rl.protocols.task import Task
from dllm_rl.seeding import python_random
from dllm_rl.types import Example

SIDE, CELLS = 4, 16
HOLE = "."


class Sudoku4(Task):
    """Fill a 4x4 grid so that every row, column and 2x2 box holds 1..4.

    The prompt is the grid in reading order with "." for a hole, then "="; the completion is all 16 digits. Only 288
    grids exist, so puzzles are split by their solution: no grid occurs in both splits.
    Hints are cells of the solution. For preferences, the solution is chosen and a board with one to three wrong cells
    is rejected.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options. Difficulty is the number of holes."""

        min_holes: int = 6
        max_holes: int = 10  # uniqueness needs at least 4 givens
        train_puzzles: int = 32768
        test_puzzles: int = 1024
        test_fraction: float = 0.2  # share of the 288 grids that is held out
        split_seed: int = 0

        def __post_init__(self) -> None:
            if not 1 <= self.min_holes <= self.max_holes <= 12:
                raise UserError(
                    f"min_holes = {self.min_holes}, max_holes = {self.max_holes}: need 1 <= min <= max <= 12"
                )
            if not 0 < self.test_fraction < 1:
                raise UserError(f"test_fraction = {self.test_fraction}: must be in (0, 1)")
            if self.train_puzzles < 1 or self.test_puzzles < 1:
                raise UserError("train_puzzles and test_puzzles must be at least 1")

    rewards = ("sudoku",)
    success = "sudoku"
    characters = "1234" + HOLE + "="
    config: Config

    def examples(self, split: Literal["train", "test"]) -> Sequence[Example]:
        """Distinct puzzles of the split's grids, generated in a fixed order."""
        c = self.config
        order = list(all_grids())
        python_random(c.split_seed, "sudoku4", "split").shuffle(order)
        held = max(1, round(len(order) * c.test_fraction))
        grids = order[:held] if split == "test" else order[held:]
        wanted = c.test_puzzles if split == "test" else c.train_puzzles
        draw = python_random(c.split_seed, "sudoku4", split)
        found: dict[str, Example] = {}
        attempts = 0
        while len(found) < wanted:
            attempts += 1
            if attempts > 50 * wanted + 1000:
                raise UserError(
                    f"only {len(found)} of {wanted} distinct {split} puzzles with {c.min_holes}..{c.max_holes} holes "
                    f"found; ask for fewer, or allow more holes"
                )
            grid = draw.choice(grids)
            holes = draw.randint(c.min_holes, c.max_holes)
            emptied = frozenset(draw.sample(range(CELLS), holes))
            puzzle = _dig(grid, emptied)
            if puzzle not in found and is_unique(grid, emptied):
                found[puzzle] = Example(
                    uid=f"sudoku4-{puzzle}",
                    prompt=f"{puzzle}=",
                    answer=grid,
                    task="sudoku4",
                    completion=grid,
                    trace=grid,
                    chosen=grid,
                    rejected=_spoil(grid, sorted(emptied), python_random(c.split_seed, "sudoku4", "rejected", puzzle)),
                    columns={"puzzle": puzzle, "holes": holes},
                )
        return list(found.values())

    def self_test(self, example: Example) -> tuple[str, str]:
        """The solution, and the solution with one hole filled wrongly."""
        hole = example.columns["puzzle"].index(HOLE)
        wrong = str(int(example.answer[hole]) % SIDE + 1)
        return example.answer, example.answer[:hole] + wrong + example.answer[hole + 1 :]


@cache
def all_grids() -> tuple[str, ...]:
    """The 288 valid grids as 16 digits in reading order."""
    return tuple(_grids_below(()))


def _grids_below(rows: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    """Grids that start with these rows."""
    if len(rows) == SIDE:
        yield "".join(itertools.chain.from_iterable(rows))
        return
    for row in itertools.permutations("1234"):
        column_clash = any(digit == above[c] for above in rows for c, digit in enumerate(row))
        box_clash = len(rows) % 2 == 1 and not set(row[:2]).isdisjoint(rows[-1][:2])  # the other box follows
        if not column_clash and not box_clash:
            yield from _grids_below((*rows, row))


def is_unique(grid: str, holes: Iterable[int]) -> bool:
    """Whether the grid is the only solution of the puzzle with these cells emptied.

    Another grid solves it too exactly if all the cells where the two grids differ are holes.
    """
    givens = ~_mask(holes)
    return all(difference & givens for difference in _differences(grid))


@cache
def _differences(grid: str) -> tuple[int, ...]:
    """Bit masks of the cells in which another grid differs; only those that contain no other one decide anything."""
    masks: list[int] = []
    others = {_mask(c for c in range(CELLS) if other[c] != grid[c]) for other in all_grids() if other != grid}
    for mask in sorted(others, key=int.bit_count):
        if all(mask & smaller != smaller for smaller in masks):
            masks.append(mask)
    return tuple(masks)


def _mask(cells: Iterable[int]) -> int:
    return sum(1 << cell for cell in cells)


def _spoil(grid: str, holes: Sequence[int], draw: Random) -> str:
    """The solution with some of the holes filled wrongly."""
    cells = list(grid)
    for hole in draw.sample(holes, min(len(holes), draw.randint(1, 3))):
        cells[hole] = draw.choice([digit for digit in "1234" if digit != grid[hole]])
    return "".join(cells)


def _dig(grid: str, holes: frozenset[int]) -> str:
    return "".join(HOLE if cell in holes else digit for cell, digit in enumerate(grid))
