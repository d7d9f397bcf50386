"""diffu-GRPO: GRPO with a one-step mean-field likelihood.

    phi_i(theta) = log p_theta(x_i | prompt with 15% of its tokens masked, completion fully masked)
    J = mean_i [ min(r_i A, clip(r_i, 1-eps, 1+eps) A) - beta k3(phi_i, phi_ref_i) ],   r_i = exp(phi_i - phi_old_i)
    A = R - mean_group(R)

Source: Zhao et al. 2025 (d1), arXiv:2504.12216, Section 3.
Deviation: the prompt masks are materialised with the batch, where the released code re-seeds the global generator with
one of 4,096 seeds; prompt masking spares nothing (as released), set ``prompt_mask_rate: 0`` to keep templates intact.
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


class DiffuGRPO(Algorithm):
    """GRPO on a single fully masked view."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        prompt_mask_rate: float = 0.15  # share of prompt tokens masked in the scored view
        fresh_masks: bool = True  # new draws at every update of a step; else all of them see one mask, and learn it
        epsilon: float = 0.5  # clip half-width of the ratio, dimensionless
        beta: float = 0.04  # weight of KL(new || reference), nats per token
        reduction: surrogate.Reduction = "token_mean"

        def __post_init__(self) -> None:
            surrogate.Clipping.__post_init__(self)
            ranges.not_negative(beta=self.beta)
            if not 0 <= self.prompt_mask_rate < 1:
                raise UserError(f"prompt_mask_rate = {self.prompt_mask_rate}: must be in [0, 1)")

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(reference=self.config.beta > 0, fresh_masks=self.config.fresh_masks)  # only the KL term reads it

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """A = R - mean of the group, not divided by the deviation."""
        return advantage.group_mean(rewards.total, batch.group, rewards.included, batch.episode)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """One view: the completion masked, and some of the prompt."""
        prompt = batch.valid & ~batch.completion & ~batch.tail
        prompt[:, 0] = False  # families that predict the next position cannot hide the first one
        rate = self.config.prompt_mask_rate
        sample = masking.fully_masked(batch.completion, prompt=prompt, prompt_mask_rate=rate, generator=generator)
        return sample.also_masking(batch.tail)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J and the mean KL."""
        return surrogate.clipped_loss(
            new, experience, epsilon=self.config, beta=self.config.beta, reduction=self.config.reduction
        )
