"""Commit the positions whose distribution has the lowest entropy.

Source: Ye et al. 2025 (Dream), arXiv:2508.15487 (``alg="entropy"`` and ``alg_temp`` of the released code).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion.decoding import draw_best
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy


class Entropy(UnmaskingStrategy):
    """Lowest entropy first."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        temperature: float = 0.0  # 0 = the best positions; else drawn in proportion to exp(-entropy / temperature)

        def __post_init__(self) -> None:
            ranges.not_negative(temperature=self.temperature)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.samples = config.temperature > 0

    @override
    def select(self, candidates: Candidates) -> Tensor:
        c = candidates
        return draw_best(-c.entropy, c.eligible, c.count, c.noise, temperature=self.config.temperature)
