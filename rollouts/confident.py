"""What strategies share that commit as many of the best positions as the model's figures allow, up to a cap."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion.decoding import take_best
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy


class ConfidenceDriven(UnmaskingStrategy):
    """The best positions by score(), as many as number() says and the cap allows."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options that all of them have."""

        max_tokens_per_step: int | None = None  # positions that a forward commits at most; null = any number

        def __post_init__(self) -> None:
            if self.max_tokens_per_step is not None:
                ranges.at_least_one(max_tokens_per_step=self.max_tokens_per_step)

    config: Config

    @override
    def select(self, candidates: Candidates) -> Tensor:
        number = self.number(candidates)
        if self.config.max_tokens_per_step is not None:
            number = number.clamp(max=self.config.max_tokens_per_step)
        return take_best(self.score(candidates), candidates.eligible, number)

    def score(self, candidates: Candidates) -> Tensor:
        """(N, W) what positions are ranked by; the probability of the proposed token unless overridden."""
        return candidates.logp

    def number(self, candidates: Candidates) -> Tensor:
        """(N,) int64 positions to commit; at least 1."""
        raise NotImplementedError
