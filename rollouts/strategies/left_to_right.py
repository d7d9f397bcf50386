"""Commit positions in reading order: the autoregressive special case."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.diffusion.decoding import take_best
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy


class LeftToRight(UnmaskingStrategy):
    """Leftmost first."""

    @override
    def select(self, candidates: Candidates) -> Tensor:
        return take_best(torch.zeros_like(candidates.logp), candidates.eligible, candidates.count)
