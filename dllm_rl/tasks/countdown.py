"""Countdown: reach a target from 3 to 6 numbers, each used once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from dllm_rl.errors import UserError
from dllm_rl.protocols.task import Task
from dllm_rl.seeding import derive, python_random
from dllm_rl.types import Example

_LEVEL = {"+": 1, "-": 1, "*": 2, "/": 2}


class Countdown(Task):
    """Combine the numbers with + - * / and parentheses.

    Every puzzle is solvable: its target is the value of a random expression over its numbers, whose intermediate
    results are positive integers. Puzzles are split by their sorted numbers, so no set of numbers is in both splits.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options. Difficulty is the number of numbers."""

        min_numbers: int = 3
        max_numbers: int = 4  # at most 6
        largest: int = 99  # numbers are drawn from 1..largest
        largest_target: int = 999
        train_puzzles: int = 4096
        test_puzzles: int = 512
        test_fraction: float = 0.1  # share of the number sets that is held out
        chat: bool = False  # ask in words, as a user message, for <answer>expression</answer>; for instruct models
        split_seed: int = 0

        def __post_init__(self) -> None:
            if not 3 <= self.min_numbers <= self.max_numbers <= 6:
                raise UserError(
                    f"min_numbers = {self.min_numbers}, max_numbers = {self.max_numbers}: need 3 <= min <= max <= 6"
                )
            if self.largest < 2 or self.largest_target < 2:
                raise UserError("largest and largest_target must be at least 2")
            if not 0 < self.test_fraction < 1:
                raise UserError(f"test_fraction = {self.test_fraction}: must be in (0, 1)")
            if self.train_puzzles < 1 or self.test_puzzles < 1:
                raise UserError("train_puzzles and test_puzzles must be at least 1")

    rewards = ("countdown",)
    success = "countdown"
    characters = "0123456789 ,+-*/()=\n"
    config: Config

    def examples(self, split: Literal["train", "test"]) -> Sequence[Example]:
        """Distinct puzzles, generated in a fixed order."""
        c = self.config
        wanted = c.test_puzzles if split == "test" else c.train_puzzles
        draw = python_random(c.split_seed, "countdown", split)
        found: dict[str, Example] = {}
        attempts = 0
        while len(found) < wanted:
            attempts += 1
            if attempts > 200 * wanted + 1000:
                raise UserError(f"only {len(found)} of {wanted} distinct {split} puzzles found; allow larger numbers")
            numbers = [draw.randint(1, c.largest) for _ in range(draw.randint(c.min_numbers, c.max_numbers))]
            held_out = derive(c.split_seed, "countdown", *sorted(numbers)) % 10_000 < c.test_fraction * 10_000
            if held_out != (split == "test"):
                continue
            text, target = _random_expression(numbers, draw)
            prompt = f"{','.join(map(str, numbers))}={target}\n"
            if not 1 < target <= c.largest_target or prompt in found:
                continue
            found[prompt] = Example(
                uid=f"countdown-{'-'.join(map(str, numbers))}-{target}",
                prompt=[{"role": "user", "content": _asked(numbers, target)}] if c.chat else prompt,
                answer=str(target),
                task="countdown",
                completion=f"<answer>{text}</answer>" if c.chat else text,
                columns={"numbers": numbers, "target": target},
            )
        return list(found.values())

    def self_test(self, example: Example) -> tuple[str, str]:
        """The generator's expression, and one that leaves numbers out and uses the target instead."""
        assert example.completion is not None
        return example.completion, f"{example.columns['numbers'][0]}+{example.columns['target']}"


def _asked(numbers: Sequence[int], target: int) -> str:
    return (
        f"Using the numbers {', '.join(map(str, numbers))}, write an arithmetic expression that equals {target}. Use "
        f"every number exactly once, and only + - * / and parentheses. Put it between <answer> and </answer>."
    )


def _random_expression(numbers: Sequence[int], draw: Random) -> tuple[str, int]:
    """A random expression over all numbers with positive integer intermediate results, and its value."""
    parts = [(str(n), n, 3) for n in numbers]  # text, value, binding strength of its outermost operator
    while len(parts) > 1:
        i, j = draw.sample(range(len(parts)), 2)
        left, right = parts[i], parts[j]
        legal = ["+", "*"] + ["-"] * (left[1] > right[1]) + ["/"] * (left[1] % right[1] == 0)
        operator = draw.choice(legal)
        value = {
            "+": left[1] + right[1],
            "*": left[1] * right[1],
            "-": left[1] - right[1],
            "/": left[1] // right[1],
        }[operator]
        level = _LEVEL[operator]
        # a - (b + c) and a / (b * c) need their parentheses, a + (b + c) does not
        tight = right[2] < level or (right[2] == level and operator in "-/")
        text = f"{_wrap(left[0], left[2] < level)}{operator}{_wrap(right[0], tight)}"
        parts = [p for k, p in enumerate(parts) if k not in (i, j)] + [(text, value, level)]
    return parts[0][0], parts[0][1]


def _wrap(text: str, needed: bool) -> str:
    return f"({text})" if needed else text
