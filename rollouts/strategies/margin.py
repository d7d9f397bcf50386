"""Commit the positions where the best token leads the second best by most.

Source: Kim et al. 2025, arXiv:2502.06768 (top probability margin); ``alg="topk_margin"`` and ``alg_temp`` of Dream's
released code, arXiv:2508.15487.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from dllm_rl.protocols.strategy import Candidates
from rollouts.ranked import Ranked


class Margin(Ranked):
    """Largest probability margin first."""

    @override
    def score(self, candidates: Candidates) -> Tensor:
        return candidates.margin
