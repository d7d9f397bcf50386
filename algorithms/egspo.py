"""EGSPO: GRPO on the K decoding steps of a row at which the model was least sure.

    U_s = positions that forward s committed,   l_s = sum_{i in U_s} log p_theta(x_i | state before s)
    S   = the K steps of a row with the largest  mean_{i in U_s} H(p_old(. | state before s) at i)
    J   = mean_rows mean_{s in S} 1/|U_s| [ min(r_s A, clip(r_s, 1-eps, 1+eps_high) A) - beta k3(l_s, l_ref_s) ]
    r_s = exp(l_s - l_old_s),   A = R - mean_group(R)

The action is a step: its tokens share a ratio. Steps of low entropy have a small gradient whatever their reward is, and
get none here. Old and new policy, entropies and the reference are forwarded in all states of the trajectory without
gradient; forwards with gradient are K a row. In block-causal models the steps of different blocks are different steps.

Source: Kunde et al. 2026 (EGSPO), arXiv:2603.12554, and its released trainer.
Deviation: steps and tokens are counted up to EOS; the K steps of a row make one update, where the released code takes
them one after the other, two to an update. EGSPO-SA, whose A_s compares R with the reward of the completion that the
model predicts at s, is not part of it: rollouts do not keep these completions.
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


class EGSPO(Algorithm):
    """GRPO on steps, chosen by entropy."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        steps: int = 8  # K: decoding steps of a row to learn from; all of them if it has fewer
        epsilon: float = 0.2  # clip half-width of the ratio below 1, dimensionless
        clip: surrogate.Clip = "asymmetric"
        epsilon_high: float = 0.5  # above 1
        beta: float = 0.04  # weight of KL(new || reference) of a step, per token

        def __post_init__(self) -> None:
            ranges.at_least_one(steps=self.steps)
            surrogate.Clipping.__post_init__(self)
            ranges.not_negative(beta=self.beta)

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(trajectory=True, entropy=True, reference=self.config.beta > 0)  # only the KL term reads it

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
        """-J; the ratios of the metrics are those of all steps, each as often as it has tokens."""
        c, batch, counts = self.config, experience.batch, experience.counts
        assert experience.entropy is not None, "needs.entropy"
        assert experience.advantage.dim() < 3, "a token is scored in one draw"
        where = batch.generated
        step = masking.merged_steps(batch.unmask_step, where, block_ids=batch.block_ids).masked_fill(~where, 0)
        width = int(step.max()) + 1

        def of_steps(value: Tensor) -> Tensor:
            """(N, S) sums of (N, L) over the tokens of each step."""
            value = torch.where(where, value, 0.0)
            return value.new_zeros(len(batch), width).scatter_add(1, step, value)

        size = of_steps(torch.ones_like(new.token_logp))
        each = size.clamp(min=1)
        chosen = most_uncertain(of_steps(experience.entropy) / each, size > 0, c.steps)
        value = of_steps(advantage.per_token(experience.advantage).expand(where.shape)) / each
        logp = of_steps(new.token_logp)
        log_ratio = logp - of_steps(experience.old.token_logp)
        gain = c.gain(log_ratio, value, chosen, batch.group)
        spread = (log_ratio.gather(1, step), value.gather(1, step))
        metrics = surrogate.ratio_metrics(*spread, c, where, counts.num_tokens)
        if c.beta > 0:
            assert experience.reference is not None, "beta > 0 means needs.reference"
            kl = surrogate.divergence(logp, of_steps(experience.reference.token_logp), "k3")
            metrics["kl"] = surrogate.reduce(kl.detach() / each, chosen, "sequence_mean", counts)
            gain = gain - c.beta * kl
        return Loss(-surrogate.reduce(gain / each, chosen, "sequence_mean", counts), metrics)


def most_uncertain(entropy: Tensor, there: Tensor, number: int) -> Tensor:
    """(N, S) bool: the steps of largest entropy of each row, so many or all that it has; earlier ones first if equal.

    Args:
        entropy: (N, S) nats.
        there: (N, S) bool, which steps a row has.
        number: most steps per row.
    """
    order = entropy.masked_fill(~there, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    return there & (order.argsort(-1) < number)
