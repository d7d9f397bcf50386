"""Commit positions in random order.

Source: the reverse process of absorbing diffusion, Austin et al. 2021 (D3PM), arXiv:2107.03006.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from dllm_rl.diffusion.decoding import take_best
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy


class RandomOrder(UnmaskingStrategy):
    """Uniformly random positions."""

    @override
    def select(self, candidates: Candidates) -> Tensor:
        return take_best(candidates.noise, candidates.eligible, candidates.count)
