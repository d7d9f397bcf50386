"""A task: training and held-out rows, and what must count as right."""

from __future__ import annotations

from dataclasses import dataclass

from dllm_rl.protocols.task import Task
from dllm_rl.types import Example


class Echo(Task):
    """Repeat a number of two digits."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        first: int = 10  # smallest number
        last: int = 50

    rewards = ("acme.reward:same_digits",)
    success = "acme.reward:same_digits"
    characters = "0123456789=+"

    def examples(self, split):
        numbers = [n for n in range(self.config.first, self.config.last) if (n % 5 == 0) == (split == "test")]
        return [Example(uid=f"echo-{n}", prompt=f"{n}=", answer=str(n), task="echo") for n in numbers]

    def self_test(self, example):
        return example.answer, "+" + example.answer[1:]
