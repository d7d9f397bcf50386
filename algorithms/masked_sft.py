"""Masked supervised fine-tuning: the any-order ELBO of reference completions as a loss.

    n ~ U{1..C},  M a uniform n-subset of the C completion tokens
    loss = - 1/N sum_rows 1/C * (C/n) sum_{i in M} log p_theta(x_i | x with M masked)

Source: Nie et al. 2025 (LLaDA), arXiv:2502.09992, Eq. 5 and Algorithm 2 (SFT).
Deviation: the default hides a fixed count n instead of Bernoulli(t): the same expectation, without the 1/t tail of the
released code (t as small as 1e-3 gives a token a weight of 1000). ``masking: bernoulli`` is the paper's form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.diffusion import masking, surrogate
from dllm_rl.protocols.algorithm import Algorithm, Needs
from dllm_rl.types import Experience, LikelihoodEstimate, Loss, MaskSample, Rewards, RolloutBatch


class MaskedSFT(Algorithm):
    """Maximise the likelihood bound of demonstrations."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        masking: Literal["uniform_count", "bernoulli"] = "uniform_count"  # how many tokens a draw hides
        draws: int = 1  # noised copies per row, stratified over masking rates
        reduction: surrogate.Reduction = "sequence_mean"  # LLaDA divides by each row's own length
        pad_to_canvas: bool = False  # score EOS padding up to max_new_tokens, as LLaDA's SFT does

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(old=False, source="demonstrations", group_size=1)

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """Demonstrations carry no reward: every row counts alike."""
        return torch.ones(len(batch))

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """Draws by count or by rate."""
        sampler = masking.uniform_count if self.config.masking == "uniform_count" else masking.bernoulli
        return sampler(batch.completion, draws=self.config.draws, generator=generator)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """The negative bound, nats per token."""
        where, counts = experience.batch.completion, experience.counts
        bound = surrogate.reduce(new.token_logp, where, self.config.reduction, counts)
        return Loss(-bound)
