"""Commit the positions whose distribution has the lowest entropy.

Source: Ye et al. 2025 (Dream), arXiv:2508.15487 (``alg="entropy"`` and ``alg_temp`` of the released code).
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from dllm_rl.protocols.strategy import Candidates
from rollouts.ranked import Ranked


class Entropy(Ranked):
    """Lowest entropy first."""

    @override
    def score(self, candidates: Candidates) -> Tensor:
        return -candidates.entropy
