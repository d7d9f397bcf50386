"""4x4 Sudoku: the board, or the share of its empty cells, that was filled right.

The papers of the d1 family report the share of originally empty cells ("cells"); "board" is stricter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rewards import Verdict


class Sudoku:
    """Compares a completion of 16 digits with the only solution."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        mode: Literal["board", "cells"] = "board"  # 1 for a solved board, or the share of empty cells that are right

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(
        self, prompts: list[Any], completions: list[str], *, puzzle: list[str], answer: list[str], **columns: list[Any]
    ) -> list[Verdict]:
        """One verdict per completion; "invalid" unless it is 16 digits 1..4."""
        return [self._score(*row) for row in zip(completions, puzzle, answer, strict=True)]

    def _score(self, completion: str, puzzle: str, answer: str) -> Verdict:
        filled = "".join(completion.split())
        if len(filled) != len(answer) or set(filled) - set("1234"):
            return Verdict(0.0, "invalid")
        if self.config.mode == "board":
            return Verdict(float(filled == answer))
        empty = [cell for cell, given in enumerate(puzzle) if given == "."]
        # A given that was overwritten counts as one more cell to get right: only the solved board reaches 1.
        overwritten = sum(given not in (".", digit) for given, digit in zip(puzzle, filled, strict=True))
        return Verdict(sum(filled[cell] == answer[cell] for cell in empty) / (len(empty) + overwritten))


class SudokuCells(Sudoku):
    """The share of empty cells, as a component of its own beside the board (weight 0 reports it only)."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(Sudoku.Config):
        """Options."""

        mode: Literal["board", "cells"] = "cells"
