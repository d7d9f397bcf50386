"""Commit the positions whose distribution has the lowest entropy.

Source: Ye et al. 2025 (Dream), arXiv:2508.15487 (``alg="entropy"`` of the released code).
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from dllm_rl.diffusion.decoding import take_best
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy


class Entropy(UnmaskingStrategy):
    """Lowest entropy first; tokens_per_step positions a forward."""

    @override
    def select(self, candidates: Candidates) -> Tensor:
        return take_best(-candidates.entropy, candidates.eligible, candidates.count)
