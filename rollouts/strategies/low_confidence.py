"""Commit the positions whose proposed token is most probable.

Source: "low-confidence remasking", Chang et al. 2022 (MaskGIT), arXiv:2202.04200; Nie et al. 2025 (LLaDA),
arXiv:2502.09992, Algorithm 5; `alg="maskgit_plus"` and `alg_temp` of Dream's released code, arXiv:2508.15487.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion.decoding import draw_best
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy


class LowConfidence(UnmaskingStrategy):
    """Highest probability of the proposed token first."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        temperature: float = 0.0  # 0 = the best positions; else drawn in proportion to exp(confidence / temperature)

        def __post_init__(self) -> None:
            ranges.not_negative(temperature=self.temperature)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.samples = config.temperature > 0

    @override
    def select(self, candidates: Candidates) -> Tensor:
        c, temperature = candidates, self.config.temperature
        score = c.logp.exp() if temperature else c.logp  # the same order, but small probabilities are no ties
        return draw_best(score, c.eligible, c.count, c.noise, temperature=temperature)
