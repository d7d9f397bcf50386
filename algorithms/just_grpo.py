"""JustGRPO: GRPO with exact left-to-right likelihoods; parallel decoding is left to test time.

    l_i(theta) = log p_theta(x_i | x with i and everything after it masked)
    J = mean_i [ min(r_i A, clip(r_i, 1-eps, 1+eps) A) ],   r_i = exp(l_i - l_old_i)
    A = (R - mean_group(R)) / std_group(R)

Source: "The Flexibility Trap", arXiv:2601.15165. Rollouts are decoded left to right, one token per forward
(``sampling: {strategy: {name: left_to_right}, tokens_per_step: 1}``); other rollouts are refused.
Deviation: tokens after EOS are not trained, where the released code trains the whole canvas. On full attention a
likelihood costs one forward per token; block-causal models score a token of every block per forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion import advantage, masking, surrogate
from dllm_rl.errors import UserError
from dllm_rl.protocols.algorithm import Algorithm, Needs, Plan
from dllm_rl.types import Experience, LikelihoodEstimate, Loss, MaskSample, Rewards, RolloutBatch


class JustGRPO(Algorithm):
    """GRPO as for a causal model."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        epsilon: float = 0.2  # clip half-width of the ratio, dimensionless
        beta: float = 0.0  # weight of KL(new || reference), nats per token
        reduction: surrogate.Reduction = "sequence_sum"  # released: over the canvas length, a constant

        def __post_init__(self) -> None:
            surrogate.Clipping.__post_init__(self)
            ranges.not_negative(beta=self.beta)

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(reference=self.config.beta > 0)  # only the KL term reads it

    @override
    def check_plan(self, plan: Plan) -> None:
        """Its likelihoods are those of left-to-right rollouts only."""
        one_each = plan.sampling.tokens_per_step == 1 and plan.sampling.schedule in ("static", "uniform")
        if plan.strategy != "left_to_right" or not one_each:
            raise UserError(
                "algorithm 'just_grpo' scores left-to-right decoding; set sampling.strategy.name=left_to_right, "
                "sampling.tokens_per_step=1 and sampling.schedule=static (evaluate.strategy and "
                "evaluate.tokens_per_step are those of test time)"
            )

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """Normalised within the group; groups of equal rewards give 0."""
        return advantage.normalised(rewards, batch)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """One draw per token; for block-causal models one draw holds a token of every block."""
        sample = masking.left_to_right(batch.generated | batch.tail, batch.generated, block_ids=batch.block_ids)
        return sample.also_masking(batch.tail)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J."""
        c = self.config
        return surrogate.clipped_loss(new, experience, epsilon=c, beta=c.beta, reduction=c.reduction)
