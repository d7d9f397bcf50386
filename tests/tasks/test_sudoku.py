"""The generator is scored by a solver that shares nothing with it."""

import time

import pytest

from dllm_rl.tasks.sudoku import Sudoku4, all_grids


def solutions(puzzle: str) -> list[str]:
    """Plain backtracking over the first hole."""
    if "." not in puzzle:
        return [puzzle]
    cell = puzzle.index(".")
    row, column = divmod(cell, 4)
    peers = [
        4 * r + c
        for r in range(4)
        for c in range(4)
        if r == row or c == column or (r // 2, c // 2) == (row // 2, column // 2)
    ]
    taken = {puzzle[peer] for peer in peers}
    return [s for digit in "1234" if digit not in taken for s in solutions(puzzle[:cell] + digit + puzzle[cell + 1 :])]


def task(**options) -> Sudoku4:
    return Sudoku4(Sudoku4.Config(**{"train_puzzles": 300, "test_puzzles": 100} | options))


def test_there_are_288_grids():
    assert sorted(all_grids()) == sorted(solutions("." * 16))
    assert len(all_grids()) == 288


@pytest.mark.parametrize("holes", [1, 8, 12])
def test_every_puzzle_has_exactly_its_own_solution(holes):
    for example in task(min_holes=holes, max_holes=holes, train_puzzles=16).examples("train"):
        puzzle = example.columns["puzzle"]
        assert puzzle.count(".") == example.columns["holes"] == holes
        assert solutions(puzzle) == [example.answer] == [example.completion]


def test_no_solution_grid_is_in_both_splits():
    train, test = ({e.answer for e in task(train_puzzles=3000).examples(split)} for split in ("train", "test"))
    assert not train & test
    assert len(train) == 230  # every training grid is used: 288 minus a fifth
    assert {e.answer for e in task(split_seed=1).examples("test")} != test


def test_examples_are_the_same_every_time_and_distinct():
    first, second = task().examples("train"), task().examples("train")
    assert first == second
    assert len({e.uid for e in first}) == len(first) == 300


def test_prompt_and_completion_stay_within_the_declared_characters():
    for example in task().examples("test"):
        assert set(example.prompt + example.completion) <= set(Sudoku4.characters)
        assert len(example.prompt) == 17


def test_the_canarys_wrong_answer_keeps_the_givens():
    example = task().examples("train")[0]
    gold, wrong = task().self_test(example)
    assert gold == example.answer != wrong
    assert all(given in (".", digit) for given, digit in zip(example.columns["puzzle"], wrong, strict=True))


def test_thousands_of_puzzles_take_about_a_second():
    started = time.perf_counter()
    task(train_puzzles=8192).examples("train")
    assert time.perf_counter() - started < 4  # 0.5 s on an idle core


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_holes": 0}, "min_holes = 0"),
        ({"min_holes": 9, "max_holes": 8}, "min_holes = 9, max_holes = 8"),
        ({"max_holes": 13}, "max_holes = 13"),
        ({"test_fraction": 1.0}, "test_fraction = 1.0"),
        ({"test_puzzles": 0}, "at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        task(**options)


def test_more_puzzles_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"distinct test puzzles with 1\.\.1 holes"):
        task(min_holes=1, max_holes=1, test_puzzles=58 * 16 + 1).examples("test")
