"""CJ-GRPO: GRPO along the decoding trajectory in which every step of a row weighs the same.

    U_s = positions that forward s committed,   l_i = log p_theta(x_i | state before the forward that committed i)
    J = mean_rows mean_s mean_{i in U_s} [ min(r_i A, clip(r_i, 1-eps, 1+eps) A) - beta k3(l_i, l_ref_i) ]
    r_i = exp(l_i - l_old_i),   A = R - mean_group(R)

TraceRL (trace_rl) has the same likelihood and weighs tokens the same: the two differ where forwards commit different
numbers of tokens. In block-causal models the steps of different blocks are different steps. As many forwards as the row
had are scored, a graph at a time.

Source: Yang et al. 2025 (CJ-GRPO), arXiv:2509.23924, Eq. 11.
Deviation: steps and tokens are counted up to EOS, where the released code scores the whole canvas.
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


class CJGRPO(Algorithm):
    """GRPO on the states that the sampler visited, step by step."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        epsilon: float = 0.5  # clip half-width of the ratio, dimensionless
        beta: float = 0.04  # weight of KL(new || reference), nats per token

        def __post_init__(self) -> None:
            ranges.positive(epsilon=self.epsilon)
            ranges.not_negative(beta=self.beta)

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(trajectory=True, reference=self.config.beta > 0)  # only the KL term reads it

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """A = R - mean of the group, not divided by the deviation."""
        return advantage.group_mean(rewards.total, batch.group, rewards.included, batch.episode)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """One draw per decoding step; for block-causal models one draw holds a step of every block."""
        return masking.along_trajectory(batch.unmask_step, batch.generated, block_ids=batch.block_ids)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J and the mean KL."""
        c, batch, counts = self.config, experience.batch, experience.counts
        assert experience.advantage.dim() < 3, "a token is scored in one draw"
        where, value = batch.generated, advantage.per_token(experience.advantage)
        log_ratio = new.token_logp - experience.old.token_logp
        metrics = surrogate.ratio_metrics(log_ratio, value, c.epsilon, where, counts.num_tokens)
        gain = surrogate.clipped(log_ratio, value, c.epsilon)
        if c.beta > 0:
            assert experience.reference is not None, "beta > 0 means needs.reference"
            kl = surrogate.divergence(new.token_logp, experience.reference.token_logp, "k3")
            metrics["kl"] = surrogate.reduce(kl.detach(), where, "token_mean", counts)
            gain = gain - c.beta * kl
        return Loss(-surrogate.reduce(gain * step_weight(batch), where, "sequence_sum", counts), metrics)


def step_weight(batch: RolloutBatch) -> Tensor:
    """(N, L) float32: 1/(S |U_s|) at the tokens of step s of a row with S steps; sums to 1 over a row."""
    where = batch.generated
    step = masking.merged_steps(batch.unmask_step, where, block_ids=batch.block_ids).masked_fill(~where, 0)
    size = torch.zeros(len(batch), int(step.max()) + 1, device=step.device).scatter_add(1, step, where.float())
    steps = (size > 0).sum(-1, keepdim=True)
    return torch.where(where, 1 / (steps * size.gather(1, step)).clamp(min=1), 0.0)
