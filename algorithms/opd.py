"""OPD: on-policy distillation; the model decodes, and a teacher scores every token that it committed.

    l_i(theta) = log p_theta(x_i | state before the forward that committed token i),    as in trace_rl
    a_i = log q_i - l_old_i, cut at +- max_gap                          log q_i: of x_i under the teacher, nats
    J   = mean_i gain(r_i, a_i + reward_weight A),   r_i = exp(l_i - l_old_i),   A = R - mean_group(R)

Where x_i is drawn from p_theta itself (temperature 1, no top-k or top-p), the mean over x_i of grad l_i times a_i is
minus the gradient of the reverse divergence KL(p_theta || q) in that state. States count as given, as the tokens before
do in autoregressive distillation. A reverse divergence seeks modes: what the teacher never says is unlearned first.

The teacher is the reference of the run:

    model.teacher: {path: P}                            another checkpoint over the same vocabulary, in the same states
    model.teacher: {path: P, autoregressive: true}      a causal language model; log q_i = log q(x_i | x_<i), given the
                                                        final tokens to the left, whenever they were committed
    retain: s (without model.teacher)                   the start of the run, which sees a share s of the tokens that
                                                        the model was to commit later: self-distillation

With ``min_reward: 1`` only right completions are learned from; what comes later in a wrong one is no good hint.

Source: Lu et al. 2025, On-policy distillation, thinkingmachines.ai/blog/on-policy-distillation, and tinker-cookbook's
train_on_policy.py (log q - l_old as the advantage of a token, no discount); Luo et al. 2026 (d-OPSD), arXiv:2606.18195,
and its code for the states of the trajectory and ``retain``.
Deviation: the cut; tinker-cookbook has none. d-OPSD takes the divergence over the 20 tokens that its teacher finds most
likely, at the positions where the teacher is surest, cuts its terms at 0.05 and shows tokens of later blocks only, and
of the canvas after EOS too; the sampled token alone needs no (N, L, V) tensor of either network.
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


class OPD(Algorithm):
    """Policy gradient whose reward of a token is what a teacher thinks of it."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        epsilon: float = 0.2  # clip half-width of the ratio, dimensionless
        retain: float = 0.0  # share of the tokens committed later that the teacher sees
        max_gap: float = 10.0  # nats by which a token's two log-probabilities may differ
        reward_weight: float = 0.0  # of the group-centred reward beside the teacher, nats per unit of reward
        min_reward: float | None = None  # smallest total reward of a row to learn from; null = every row
        shrink: int = 1  # consecutive decoding steps that share a forward
        reduction: surrogate.Reduction = "token_mean"

        def __post_init__(self) -> None:
            surrogate.Clipping.__post_init__(self)
            ranges.at_least_one(shrink=self.shrink)
            ranges.positive(max_gap=self.max_gap)
            ranges.not_negative(reward_weight=self.reward_weight)
            if not 0 <= self.retain < 1:
                raise UserError(f"retain = {self.retain}: must be in [0, 1)")

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(reference=True, trajectory=True, group_size=2 if self.config.reward_weight > 0 else 1)

    @override
    def check_plan(self, plan: Plan) -> None:
        """Tokens must be samples, and the teacher must know something that the model does not."""
        if plan.sampling.temperature == 0:
            raise UserError(
                "sampling.temperature = 0: algorithm 'opd' estimates a divergence from tokens that the model has "
                "sampled, and greedy tokens are none; set sampling.temperature to 1.0"
            )
        if not plan.teacher and self.config.retain == 0:
            raise UserError(
                "algorithm 'opd' has no teacher: set model.teacher: {path: ...} to a checkpoint that knows more, or "
                "algorithm.retain: 0.25 to show the start of this run what the model commits later"
            )

    @override
    def keep(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """Every row, or those that are good enough."""
        least = self.config.min_reward
        return rewards.included if least is None else rewards.included & (rewards.total >= least)

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """Of the reward alone; the teacher's part is known to loss()."""
        centred = advantage.group_mean(rewards.total, batch.group, rewards.included, batch.episode)
        return self.config.reward_weight * centred

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """One draw per decoding step; for block-causal models one draw holds a step of every block."""
        return masking.along_trajectory(
            batch.unmask_step, batch.generated, block_ids=batch.block_ids, merge=self.config.shrink
        )

    def reference_masks(self, batch: RolloutBatch, masks: MaskSample, generator: torch.Generator) -> MaskSample:
        """The same states, with a share of what is committed later in sight."""
        if self.config.retain == 0:
            return masks
        later = masks.mask & (masks.weight == 0) & batch.generated
        chance = torch.rand(later.shape, generator=generator, dtype=torch.float64).to(later.device)
        return MaskSample(mask=masks.mask & ~(later & (chance < self.config.retain)), weight=masks.weight)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J; ``kl`` is the estimate of the divergence from the teacher."""
        c, batch, counts = self.config, experience.batch, experience.counts
        assert experience.reference is not None, "needs.reference"
        assert experience.advantage.dim() < 3, "a token is scored in one draw"
        where = batch.generated
        gap = experience.reference.token_logp - experience.old.token_logp
        credit = gap.clamp(-c.max_gap, c.max_gap) + advantage.per_token(experience.advantage)
        log_ratio = new.token_logp - experience.old.token_logp
        gain = c.gain(log_ratio, credit, where, batch.group)
        metrics = surrogate.ratio_metrics(log_ratio, credit, c, where, counts.num_tokens)
        metrics["kl"] = surrogate.reduce(-gap, where, "token_mean", counts)
        return Loss(-surrogate.reduce(gain, where, c.reduction, counts), metrics)
