"""TraceRL: GRPO whose likelihood replays the decoding trajectory.

    s(i) = the forward that committed token i,   H_s = positions still masked before forward s
    l_i(theta) = log p_theta(x_i | x with H_{s(i)} masked)          exact for the token choices, given the order
    J = mean_i [ min(r_i A, clip(r_i, 1-eps, 1+eps) A) - beta k3(l_i, l_old_i) ],   r_i = exp(l_i - l_old_i)
    A = (R - mean_group(R)) / std_group(R)

With ``shrink: s``, s consecutive steps (of the row, or of each block) are scored in the state before the first of them:
1/s of the forwards, with more masked than the sampler saw.

With ``value: true`` a value model V reads the same states, and A is token-wise: generalised advantage estimation over
the (merged) steps, with R on the tokens of the last one (diffusion/values.py). Nothing is compared within the group.

Source: Wang et al. 2025, arXiv:2509.06949.
Deviation: the divergence is taken to the old policy, as released; it anchors within a step only. The released code
falls back to a left-to-right trajectory when the step map is missing; here that is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion import advantage, masking, surrogate, values
from dllm_rl.errors import UserError
from dllm_rl.protocols.algorithm import Algorithm, Needs
from dllm_rl.types import Experience, LikelihoodEstimate, Loss, MaskSample, Rewards, RolloutBatch


class TraceRL(Algorithm):
    """GRPO on the states that the sampler visited."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        epsilon: float = 0.2  # clip half-width of the ratio, dimensionless
        max_log_ratio: float = 10.0  # nats, as released
        beta: float = 0.01  # weight of KL(new || old), nats per token; acts when updates_per_step > 1
        advantage: Literal["z_score", "group_mean"] = "z_score"
        reduction: surrogate.Reduction = "token_mean"
        shrink: int = 1  # consecutive decoding steps that share a forward
        value: bool = False  # train a value model for token-wise advantages; its rate is learner.value_lr
        discount: float = 1.0  # of the value model's returns, per step
        smoothing: float = 1.0  # lambda of generalised advantage estimation
        clip_value: float = 0.2  # half-width of the clip of value predictions, in units of the reward

        def __post_init__(self) -> None:
            surrogate.Clipping.__post_init__(self)
            ranges.not_negative(beta=self.beta)
            ranges.at_least_one(shrink=self.shrink)
            ranges.positive(clip_value=self.clip_value)
            for name in ("discount", "smoothing"):
                if not 0 <= getattr(self, name) <= 1:
                    raise UserError(f"{name} = {getattr(self, name)}: must be in [0, 1]")

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(trajectory=True, values=self.config.value)

    @property
    def value_clip(self) -> float:
        """As configured."""
        return self.config.clip_value

    def credit(self, rewards: Rewards, batch: RolloutBatch, value: Tensor) -> tuple[Tensor, Tensor]:
        """Generalised advantage estimation along the trajectory."""
        c, scored = self.config, batch.generated
        step = masking.merged_steps(batch.unmask_step, scored, block_ids=batch.block_ids, merge=c.shrink)
        return values.advantages_and_returns(
            rewards.total, value, step, scored, discount=c.discount, smoothing=c.smoothing
        )

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """Normalised within the group; groups of equal rewards give 0."""
        if self.config.advantage == "z_score":
            return advantage.normalised(rewards, batch)
        return advantage.group_mean(rewards.total, batch.group, rewards.included, batch.episode)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """One draw per decoding step; for block-causal models one draw holds a step of every block."""
        return masking.along_trajectory(
            batch.unmask_step, batch.generated, block_ids=batch.block_ids, merge=self.config.shrink
        )

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J and the mean divergence from the old policy."""
        c = self.config
        return surrogate.clipped_loss(
            new, experience, epsilon=c, beta=c.beta, reduction=c.reduction, anchor=experience.old
        )
