"""Commit every position that the model is sure of: as many tokens per forward as it can justify.

Source: Wu et al. 2025 (Fast-dLLM), arXiv:2505.22618; "dynamic" decoding in SDAR and TraDo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.diffusion.decoding import take_best
from dllm_rl.errors import UserError
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy


class ConfidenceThreshold(UnmaskingStrategy):
    """All positions whose proposed token reaches the threshold, at least the best one."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        threshold: float = 0.9  # probability of the proposed token, in (0, 1]

        def __post_init__(self) -> None:
            if not 0 < self.threshold <= 1:
                raise UserError(f"threshold = {self.threshold}: must be in (0, 1]")

    config: Config

    @override
    def select(self, candidates: Candidates) -> Tensor:
        """Ignores tokens_per_step."""
        sure = candidates.eligible & (candidates.logp >= math.log(self.config.threshold))
        one = torch.ones_like(candidates.count)
        return sure | take_best(candidates.logp, candidates.eligible, one)
