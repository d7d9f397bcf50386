"""Coupled-GRPO: GRPO whose likelihood comes from complementary masks.

    M ~ Bernoulli(t) per completion token,  t ~ U[t_min, t_max]
    l_i(theta) = 1/2 ( 1[i in M]/t + 1[i not in M]/(1-t) ) log p_theta(x_i | x with its own half masked)
                 averaged over pairs, and with the fully masked view if ``full_view``
    J = mean_i [ min(r_i A, clip(r_i, 1-eps, 1+eps) A) - beta k3(l_i, l_ref_i) ],   r_i = exp(l_i - l_old_i)
    A = R - mean of the other rows of its group

Source: Gong et al. 2025 (DiffuCoder), arXiv:2506.20639.
Deviation: the released code adds the fully masked view to one pair and divides by 2, so that its weights average 3/2:
that is ``paper_exact: true``; ``full_view: true`` has the same views with weights that average 1.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion import advantage, masking, surrogate
from dllm_rl.errors import UserError
from dllm_rl.protocols.algorithm import Algorithm, Needs
from dllm_rl.types import Experience, LikelihoodEstimate, Loss, MaskSample, Rewards, RolloutBatch


class CoupledGRPO(Algorithm):
    """GRPO on pairs of complementary views."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        pairs: int = 1  # independent complementary pairs, each weighs 1/pairs
        t_min: float = 0.2  # masking rates are drawn from U[t_min, t_max]
        t_max: float = 0.8
        full_view: bool = False  # add a copy with the whole completion masked; each copy weighs the same
        paper_exact: bool = (
            False  # the released estimator: one pair and the full view, weighted 3/2 in all, over the canvas
        )
        fresh_masks: bool = True  # new draws at every update of a step; else all of them see one mask, and learn it
        epsilon: float = 0.5  # clip half-width of the ratio, dimensionless
        beta: float = 0.01  # weight of KL(new || reference), nats per token
        reduction: surrogate.Reduction = "token_mean"

        def __post_init__(self) -> None:
            surrogate.Clipping.__post_init__(self)
            ranges.not_negative(beta=self.beta)
            ranges.at_least_one(pairs=self.pairs)
            if self.paper_exact and self.pairs != 1:
                raise UserError(f"pairs = {self.pairs}: the released code has 1 pair; drop paper_exact")
            if not 0 < self.t_min <= self.t_max < 1:
                raise UserError(f"t_min = {self.t_min}, t_max = {self.t_max}: need 0 < t_min <= t_max < 1")

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(reference=self.config.beta > 0, fresh_masks=self.config.fresh_masks)  # only the KL term reads it

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """Leave-one-out, not divided by the deviation."""
        return advantage.leave_one_out(rewards.total, batch.group, rewards.included, batch.episode)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """Each token is scored once per pair, in the view that hides it."""
        c = self.config
        # As released, what follows EOS is masked at the rate of the view, and not scored; else it is never in sight.
        sample = masking.complementary_pair(
            batch.completion | batch.tail if c.paper_exact else batch.completion,
            t_min=c.t_min,
            t_max=c.t_max,
            pairs=c.pairs,
            full_view=c.full_view or c.paper_exact,
            generator=generator,
        )
        if c.paper_exact:
            return dataclasses.replace(sample, weight=1.5 * sample.weight * batch.completion)
        return sample.also_masking(batch.tail)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J and the mean KL."""
        return surrogate.clipped_loss(
            new, experience, epsilon=self.config, beta=self.config.beta, reduction=self.config.reduction
        )
