"""Commit the positions whose proposed token is most probable.

Source: "low-confidence remasking", Chang et al. 2022 (MaskGIT), arXiv:2202.04200; Nie et al. 2025 (LLaDA),
arXiv:2502.09992, Algorithm 5; `alg="maskgit_plus"` and `alg_temp` of Dream's released code, arXiv:2508.15487.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from dllm_rl.protocols.strategy import Candidates
from rollouts.ranked import Ranked


class LowConfidence(Ranked):
    """Highest probability of the proposed token first."""

    @override
    def score(self, candidates: Candidates) -> Tensor:
        logp = candidates.logp
        return logp.exp() if self.config.temperature else logp  # the same order, but small probabilities are no ties
