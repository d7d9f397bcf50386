"""Commit every position that the model is sure of: as many tokens per forward as it can justify.

Source: Wu et al. 2025 (Fast-dLLM), arXiv:2505.22618; with at_least_count, ``low_confidence_dynamic`` of SDAR's released
code, arXiv:2510.06303. Differs from it: a confidence equal to the threshold is enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.errors import UserError
from dllm_rl.protocols.strategy import Candidates
from rollouts.confident import ConfidenceDriven


class ConfidenceThreshold(ConfidenceDriven):
    """All positions whose proposed token reaches the threshold, at least the best ones."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(ConfidenceDriven.Config):
        """Options."""

        threshold: float = 0.9  # probability of the proposed token, in (0, 1]
        at_least_count: bool = False  # commit as many as the schedule says, if fewer are sure; false = one

        def __post_init__(self) -> None:
            ConfidenceDriven.Config.__post_init__(self)
            if not 0 < self.threshold <= 1:
                raise UserError(f"threshold = {self.threshold}: must be in (0, 1]")

    config: Config

    @override
    def number(self, candidates: Candidates) -> Tensor:
        """Ignores the schedule, unless at_least_count."""
        sure = candidates.eligible & (candidates.logp >= math.log(self.config.threshold))
        least = candidates.count if self.config.at_least_count else torch.ones_like(candidates.count)
        return sure.sum(-1).maximum(least)
