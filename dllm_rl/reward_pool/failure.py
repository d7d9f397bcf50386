"""A verification that failed, in words for the user."""

from __future__ import annotations

from dataclasses import dataclass

from dllm_rl.types import RewardStatus


@dataclass(frozen=True, slots=True)
class Failure:
    """A verification that failed."""

    reward: str
    completion: str
    status: RewardStatus
    message: str

    def __str__(self) -> str:
        return f"reward '{self.reward}': {self.message} (completion {self.completion[:60]!r})"
