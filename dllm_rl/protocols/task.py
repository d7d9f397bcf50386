"""The contract of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dllm_rl.types import Example


class Task:
    """A source of examples with a verifier: training and held-out rows, and what the reward self-test checks."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options of the task."""

    rewards: ClassVar[tuple[str, ...]] = ()  # default reward names when the config lists none
    success: ClassVar[str] = ""  # the reward component whose value >= 1 counts as solved in evaluation
    characters: ClassVar[str] = ""  # what a character tokenizer must know even if no training text has it

    def __init__(self, config: Any) -> None:
        self.config = config

    def examples(self, split: Literal["train", "test"]) -> Sequence[Example]:
        """The rows of a split, always in the same order. Raises ValueError naming file and line of a malformed row."""
        raise NotImplementedError

    def self_test(self, example: Example) -> tuple[str, str] | None:
        """(gold, wrong): a completion that must score full marks, and one that must not, in the deployed rewards.

        None = nothing is known to be right for this example.
        """
        raise NotImplementedError
