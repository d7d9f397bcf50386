"""d2 (StepMerge): GRPO along the decoding trajectory, cut into few segments that share a state.

    n(i)  the segment, of N equal parts of a row's T forwards, in which token i was committed
    l_i(theta) = log p_theta(x_i | x with all masked that was masked before segment n(i))
    J = mean_i [ min(r_i A, clip(r_i, 1-eps, 1+eps) A) - beta k3(l_i, l_ref_i) ],   r_i = exp(l_i - l_old_i)
    A = R - mean_group(R)

N trades forwards for accuracy: N = 1 is the one-step likelihood of diffu-GRPO, N = T the trajectory's own. TraceRL's
``shrink`` merges a fixed number of steps instead, so that its forwards grow with the trajectory.

Source: Wang et al. 2025, arXiv:2509.21474 (StepMerge), and its code. AnyOrder, the paper's other estimator, needs a
model that was trained with any-order causal attention.
Deviation: the released code also masks 15% of the prompt, as d1 does, which ``prompt_mask_rate: 0.15`` brings back, and
means over the tokens of a group before groups; the paper divides by the length of the canvas. On block-causal models
a segment's tokens are scored with earlier blocks in sight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion import advantage, masking, surrogate
from dllm_rl.errors import UserError
from dllm_rl.protocols.algorithm import Algorithm, Needs
from dllm_rl.types import Experience, LikelihoodEstimate, Loss, MaskSample, Rewards, RolloutBatch


class D2(Algorithm):
    """GRPO on at most N of the states that the sampler visited."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        segments: int = 16  # N: forwards per likelihood, at most; the whole trajectory if it has fewer steps
        prompt_mask_rate: float = 0.0  # share of prompt tokens masked in every state; released: 0.15
        epsilon: float = 0.5  # clip half-width of the ratio, dimensionless
        beta: float = 0.04  # weight of KL(new || reference), nats per token
        reduction: surrogate.Reduction = "token_mean"

        def __post_init__(self) -> None:
            ranges.at_least_one(segments=self.segments)
            surrogate.Clipping.__post_init__(self)
            ranges.not_negative(beta=self.beta)
            if not 0 <= self.prompt_mask_rate < 1:
                raise UserError(f"prompt_mask_rate = {self.prompt_mask_rate}: must be in [0, 1)")

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        c = self.config
        return Needs(reference=c.beta > 0, trajectory=c.segments > 1)  # only the KL term reads the reference

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """A = R - mean of the group, not divided by the deviation."""
        return advantage.group_mean(rewards.total, batch.group, rewards.included, batch.episode)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """One draw per segment, with the same prompt tokens masked in all of them."""
        sample = masking.along_segments(
            batch.unmask_step,
            batch.generated,
            num_forwards=batch.num_forwards,
            segments=self.config.segments,
            block_ids=batch.block_ids,
        )
        if self.config.prompt_mask_rate == 0:
            return sample
        prompt = batch.valid & ~batch.completion & ~batch.tail
        prompt[:, 0] = False  # families that predict the next position cannot hide the first one
        chance = torch.rand(prompt.shape, generator=generator, dtype=torch.float64).to(prompt.device)
        return sample.also_masking(prompt & (chance < self.config.prompt_mask_rate))

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J and the mean KL."""
        c = self.config
        return surrogate.clipped_loss(new, experience, epsilon=c, beta=c.beta, reduction=c.reduction)
