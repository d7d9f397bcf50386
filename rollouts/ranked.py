"""What strategies share that rank positions by a score, and commit the best or draw among them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion.decoding import draw_best
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy


class Ranked(UnmaskingStrategy):
    """Highest score first; with a temperature, positions are drawn by their scores (Dream's ``alg_temp``)."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        temperature: float = 0.0  # 0 = the best positions; else drawn in proportion to exp(score / temperature)

        def __post_init__(self) -> None:
            ranges.not_negative(temperature=self.temperature)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.samples = config.temperature > 0

    @override
    def select(self, candidates: Candidates) -> Tensor:
        c = candidates
        return draw_best(self.score(c), c.eligible, c.count, c.noise, temperature=self.config.temperature)

    def score(self, candidates: Candidates) -> Tensor:
        """(N, W) what positions are ranked by."""
        raise NotImplementedError
