"""Commit the positions where the best token leads the second best by most.

Source: Kim et al. 2025, arXiv:2502.06768 (top probability margin).
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from dllm_rl.diffusion.decoding import take_best
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy


class Margin(UnmaskingStrategy):
    """Largest probability margin first; tokens_per_step positions a forward."""

    @override
    def select(self, candidates: Candidates) -> Tensor:
        return take_best(candidates.margin, candidates.eligible, candidates.count)
