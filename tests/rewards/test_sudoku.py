import pytest

from rewards.sudoku import Sudoku, SudokuCells

PUZZLE, SOLUTION = "1...34..21..4.2.", "1243341221344321"


def score(completion: str, reward=Sudoku, **options):
    (verdict,) = reward(reward.Config(**options))(["p"], [completion], puzzle=[PUZZLE], answer=[SOLUTION], holes=[8])
    return float(verdict), verdict.status


WRONG_CELL = "1" + "3" + SOLUTION[2:]
CHANGED_GIVEN = "2" + SOLUTION[1:]


def test_board_is_all_or_nothing():
    assert score(SOLUTION) == score(f" {SOLUTION}\n") == (1.0, "ok")
    assert score(WRONG_CELL) == score(CHANGED_GIVEN) == (0.0, "ok")


def test_cells_counts_the_empty_ones():
    empty = PUZZLE.count(".")
    assert score(SOLUTION, mode="cells") == (1.0, "ok")
    assert score(WRONG_CELL, mode="cells") == ((empty - 1) / empty, "ok")
    assert score(WRONG_CELL, reward=SudokuCells) == score(WRONG_CELL, mode="cells")


def test_an_overwritten_given_cannot_be_a_full_score():
    empty = PUZZLE.count(".")
    assert score(CHANGED_GIVEN, mode="cells") == (empty / (empty + 1), "ok")


@pytest.mark.parametrize(
    "completion",
    [
        "",
        SOLUTION[:-1],
        SOLUTION + "1",
        SOLUTION.replace("1", "0"),
        SOLUTION.replace("3", "٣"),
        "." * 16,
        "1<mask>" * 4,
    ],
)
@pytest.mark.parametrize("mode", ["board", "cells"])
def test_anything_but_sixteen_digits_is_invalid(completion, mode):
    assert score(completion, mode=mode) == (0.0, "invalid")
