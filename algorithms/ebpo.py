"""EBPO: GRPO on whole sequences of block-diffusion models, whose ELBO noises all blocks in one forward.

    B(theta) = 1/K sum_k sum_b C_b/n_kb sum_{i in M_kb} log p_theta(x_i | M_kb masked in block b, earlier blocks clean)
               n_kb ~ U{1..C_b},  M_kb a uniform n_kb-subset of the C_b completion tokens of block b
    J = mean_rows [ min(r A, clip(r, 1-eps, 1+eps) A) ] - beta D(B, B_ref),   r = exp(B - B_old)
    A = (R - mean_group(R)) / std_group(R)

A forward has the [clean | noised] layout of block-causal models: K forwards estimate all blocks at K noise levels. A
model of full attention has one block, and B is then its ELBO by counts. On a block-causal model, counts over the whole
row have the same expectation, since an order of the row is an order of every block; counts per block scatter less.

Source: LLaDA2.1, arXiv:2602.08676, Eqs. 4 and 5 (r, and its sum over noise levels and blocks); the ELBO of a block is
that of Arriola et al. 2025, arXiv:2503.09573. The code is not public, and the paper leaves open the weights of noise
levels, the advantage and the clip bounds: equal weights, z-scores, 0.2 and K = 16 are those of the port in DARE.
Deviation: one clip bound for both sides; levels are stratified over the draws of a block, where DARE stratifies over
the blocks of a batch; the divergence (k2) is per token. Sums of hundreds of tokens move ratios far from 1: with
``ratio_norm: length`` they are as ESPO's, and epsilon is of the size of log-ratios per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion import advantage, masking, surrogate
from dllm_rl.protocols.algorithm import Algorithm, Needs
from dllm_rl.types import Experience, LikelihoodEstimate, Loss, MaskSample, Rewards, RolloutBatch


class EBPO(Algorithm):
    """A completion is one action, its likelihood a sum over blocks."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        draws: int = 16  # K, noise levels per block: forwards per likelihood
        epsilon: float = 0.2  # clip half-width of the ratio
        beta: float = 0.0  # weight of the k2 divergence from the reference, per token
        fresh_masks: bool = True  # new draws at every update of a step; else all of them see one mask, and learn it
        ratio_norm: surrogate.Norm = "none"  # as Eq. 5; "length" divides log-ratios by the row's tokens

        def __post_init__(self) -> None:
            ranges.at_least_one(draws=self.draws)
            surrogate.Clipping.__post_init__(self)
            ranges.not_negative(beta=self.beta)

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        c = self.config
        return Needs(reference=c.beta > 0, fresh_masks=c.fresh_masks, row_credit=True)  # only the KL term reads it

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """Normalised within the group; groups of equal rewards give 0."""
        return advantage.normalised(rewards, batch)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """K views; each hides tokens of every block."""
        sample = masking.uniform_count(
            batch.completion, draws=self.config.draws, block_ids=batch.block_ids, generator=generator
        )
        return sample.also_masking(batch.tail)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J and the mean KL."""
        c = self.config
        return surrogate.sequence_clipped_loss(new, experience, epsilon=c, beta=c.beta, ratio_norm=c.ratio_norm)
