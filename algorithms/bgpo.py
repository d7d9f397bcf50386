"""BGPO: a lower bound of the sequence-level GRPO objective that is a sum over draws.

    d_k = (B_k - B_k_old) / C                 B_k the ELBO of draw k alone: C/n sum_{i in M_k} log p(x_i | M_k masked)
    r_k = 1 + d_k where A >= 0,  exp(d_k) where A < 0
    J = mean_i of tokens  1/K sum_k min(r_k A, clip(r_k, 1-eps, 1+eps) A)
    A = (R - mean_group(R)) / std_group(R)

The objective that it bounds has the ratio exp(mean_k d_k) instead: exp(x) >= 1 + x where A > 0, and Jensen where A < 0,
with or without the clip. At the old policy values and gradients of both are equal, whatever the draws. A term of the
sum needs the graph of one draw; so do all losses here (the learner's second phase), and what is left of the method is
its objective: ratios that do not grow exponentially for good rows, and a clip for each draw.

Source: Lin et al. 2025 (BGPO), arXiv:2510.11683; the equations are those of DARE's compute_policy_loss_bgpo.
Deviation: C is the row's own length up to EOS, where DARE divides by the padded one; 1 + d_k is computed as such,
where DARE takes exp(log(1 + d_k)) and gets NaN below d_k = -1; no second clip (at 3) for negative advantages.
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


class BGPO(Algorithm):
    """Sequence-level GRPO, draw by draw."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        draws: int = 16  # noised copies per likelihood
        fresh_masks: bool = True  # new draws at every update of a step; else all of them see one mask, and learn it
        epsilon: float = 0.2  # clip half-width of a draw's length-normalised ratio
        reduction: surrogate.Reduction = "token_mean"

        def __post_init__(self) -> None:
            ranges.at_least_one(draws=self.draws)
            ranges.positive(epsilon=self.epsilon)

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(draws=True, fresh_masks=self.config.fresh_masks)

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """Normalised within the group; groups of equal rewards give 0."""
        return advantage.normalised(rewards, batch)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """Uniform counts, stratified over the draws of a row."""
        sample = masking.uniform_count(batch.completion, draws=self.config.draws, generator=generator)
        return sample.also_masking(batch.tail)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J and what tells whether its ratios can be trusted."""
        epsilon, where, counts = self.config.epsilon, experience.batch.completion, experience.counts
        assert new.draw_token_logp is not None and experience.old.draw_token_logp is not None, "needs.draws"
        assert experience.advantage.dim() < 3, "a draw's ratio is of the whole row"
        weight = len(experience.masks.weight) * experience.masks.weight  # each draw alone is an ELBO
        change = (weight * (new.draw_token_logp - experience.old.draw_token_logp)).sum(-1) / where.sum(-1)  # (K, N)
        value, row = advantage.per_token(experience.advantage), advantage.per_row(experience.advantage)
        gain = bounded(change[..., None], value, epsilon).mean(0).expand(where.shape)
        used = torch.where(row >= 0, change.clamp(min=-0.999).log1p(), change)  # a negative ratio has no logarithm
        every, number = torch.ones_like(change, dtype=torch.bool), counts.num_rows * len(change)
        metrics = surrogate.ratio_metrics(used, row, epsilon, every, number)
        return Loss(-surrogate.reduce(gain, where, self.config.reduction, counts), metrics)


def bounded(change: Tensor, value: Tensor, epsilon: float) -> Tensor:
    """min(r A, clip(r, 1 - epsilon, 1 + epsilon) A), to be maximised; r = 1 + d where A >= 0, else exp(d).

    Args:
        change: d, nats.
        value: A; broadcasts with it.
        epsilon: clip half-width.
    """
    good = value >= 0
    # exp() of a change that is not used may overflow, and 0 * inf is NaN in the backward pass.
    ratio = torch.where(good, 1 + change, torch.where(good, 0.0, change).exp())
    return torch.minimum(ratio * value, ratio.clamp(1 - epsilon, 1 + epsilon) * value)
