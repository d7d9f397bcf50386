"""Commit the positions whose proposed token is most probable.

Source: "low-confidence remasking", Chang et al. 2022 (MaskGIT), arXiv:2202.04200; Nie et al. 2025 (LLaDA),
arXiv:2502.09992, Algorithm 5.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from dllm_rl.diffusion.decoding import take_best
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy


class LowConfidence(UnmaskingStrategy):
    """Highest untempered probability of the proposed token first; tokens_per_step positions a forward."""

    @override
    def select(self, candidates: Candidates) -> Tensor:
        return take_best(candidates.logp, candidates.eligible, candidates.count)
