"""Commit as many positions of low entropy as depend on each other little enough.

Source: Ben-Hamu et al. 2025 (EB-Sampler), arXiv:2505.24857. ``entropy_bounded`` of SDAR's released code bounds the sum
of all, and stops at its first forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.protocols.strategy import Candidates
from rollouts.confident import ConfidenceDriven


class EntropyBound(ConfidenceDriven):
    """The most positions, lowest entropy first, whose entropies without the largest sum to at most the bound."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(ConfidenceDriven.Config):
        """Options."""

        bound: float = 0.1  # nats; 0 = one position, and all that are certain

        def __post_init__(self) -> None:
            ConfidenceDriven.Config.__post_init__(self)
            ranges.not_negative(bound=self.bound)

    config: Config

    @override
    def score(self, candidates: Candidates) -> Tensor:
        return -candidates.entropy

    @override
    def number(self, candidates: Candidates) -> Tensor:
        """Ignores the schedule. The sum bounds what the positions, drawn apart, do not know of each other."""
        entropy = candidates.entropy.masked_fill(~candidates.eligible, float("inf"))
        before = entropy.sort(dim=-1).values.cumsum(-1).roll(1, dims=-1)
        before[..., 0] = 0.0
        return (before <= self.config.bound).sum(-1)
