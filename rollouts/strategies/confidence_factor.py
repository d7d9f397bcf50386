"""Commit the largest number of positions that the model's confidence in all of them allows.

Source: Wu et al. 2025 (Fast-dLLM), arXiv:2505.22618, ``factor`` of the released code: n positions are decoded together
if the k-th highest confidence c_k of each satisfies (k + 1) (1 - c_k) <= f, and k = 1 in any case. As there, the last
position comes along if it alone fails.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.protocols.strategy import Candidates
from rollouts.confident import ConfidenceDriven


class ConfidenceFactor(ConfidenceDriven):
    """The more positions of a forward, the more certain each of them must be; at least one."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(ConfidenceDriven.Config):
        """Options."""

        factor: float = 1.0  # f; higher commits more

        def __post_init__(self) -> None:
            ConfidenceDriven.Config.__post_init__(self)
            ranges.positive(factor=self.factor)

    config: Config

    @override
    def number(self, candidates: Candidates) -> Tensor:
        """Ignores the schedule."""
        eligible, left = candidates.eligible, candidates.eligible.sum(-1)
        ranked = candidates.logp.exp().masked_fill(~eligible, -1.0).sort(dim=-1, descending=True).values
        rank = torch.arange(1, ranked.shape[-1] + 1, device=ranked.device)
        fits = (ranked >= 1 - self.config.factor / (rank + 1)) | (rank == 1)
        number = fits.cumprod(-1).sum(-1).minimum(left)
        return torch.where(number == left - 1, left, number)
