"""Learned unmasking: GRPO on the decisions which tokens to commit, with the language model frozen.

    R   = 1[solved] ((C - min(T, C) + 1) / C)^alpha                 C canvas tokens, T forwards: right *and* fast
    A   = R - mean_group(R),  over policy and expert rows
    J   = mean_rows [ 1/T sum_t min(r_t A, clip(r_t, 1 - eps, 1 + eps) A) ],    r_t = exp(l_t - l_old_t)
    l_t = log pi(choice of forward t);  of an expert's row  logaddexp(log G/(G+E) + log pi, log 1/(G+E))

Expert rows (``experts``: confidence thresholds, decoded in blocks) join every group of G samples: a mixture in which
the expert is one more sampler keeps their ratios bounded where the policy would hardly do what they did.

Source: Learning unmasking policies, arXiv:2512.09106. An additive reward (right - alpha T/C) collapses to committing
everything at once there, since a fast wrong row beats a slow wrong one.
Deviations: expert steering for every group, not for the first prompt of a batch; a forward that commits nothing cannot
happen (rollouts/choices.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion import advantage, masking, surrogate
from dllm_rl.errors import UserError
from dllm_rl.protocols.algorithm import Algorithm, ExtraRollout, Needs, Plan
from dllm_rl.types import Experience, LikelihoodEstimate, Loss, MaskSample, Prompt, Rewards, RolloutBatch


class UnmaskingPolicy(Algorithm):
    """GRPO on unmasking decisions."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        alpha: float = 1.0  # exponent of speed in the reward; 0 = accuracy alone
        epsilon: float = 0.5  # clip half-width of the ratio of one forward's choice, dimensionless
        experts: list[float] | None = None  # confidence thresholds of expert rows, one row per group each
        expert_block_size: int | None = None  # decoding block of experts, tokens; null = the run's

        def __post_init__(self) -> None:
            surrogate.Clipping.__post_init__(self)
            ranges.not_negative(alpha=self.alpha)
            for threshold in self.experts or []:
                if not 0 < threshold <= 1:
                    raise UserError(f"experts = {self.experts}: thresholds are probabilities in (0, 1]")
            if self.expert_block_size is not None:
                ranges.at_least_one(expert_block_size=self.expert_block_size)

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(trains=frozenset({"policy"}), trajectory=True)

    @override
    def check_plan(self, plan: Plan) -> None:
        """The choices must be the only randomness, and somebody must make them."""
        if not plan.has_policy:
            raise UserError(
                f"algorithm 'unmasking_policy' trains the network of an unmasking strategy, and '{plan.strategy}' has "
                f"none; set sampling.strategy to {{name: learned}}"
            )
        if plan.sampling.temperature > 0:
            raise UserError(
                f"sampling.temperature = {plan.sampling.temperature}: algorithm 'unmasking_policy' gives credit to the "
                f"choice of positions alone, so tokens must be greedy; set sampling.temperature to 0"
            )
        own, theirs = plan.sampling.block_size or plan.sampling.max_new_tokens, self.config.expert_block_size
        if theirs is not None and own % theirs:
            raise UserError(
                f"algorithm.expert_block_size = {theirs}: must divide the decoding block of {own} tokens, so that the "
                f"policy could have done what the expert does"
            )

    def extra_rollouts(
        self,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        batch: RolloutBatch,
        *,
        canvas: int,
        generator: torch.Generator,
    ) -> Sequence[ExtraRollout]:
        """One row per expert for every group."""
        return [
            ExtraRollout(
                group=group,
                prompt=prompt,
                strategy={"name": "confidence_threshold", "threshold": threshold},
                block_size=self.config.expert_block_size,
            )
            for group, prompt in enumerate(prompts)
            for threshold in self.config.experts or []
        ]

    def select_rows(self, extra: Tensor, rewards: Rewards, batch: RolloutBatch, generator: torch.Generator) -> Tensor:
        """All of them."""
        return torch.arange(len(batch))

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """Centred in the group, not divided by the deviation."""
        canvas = (batch.completion | batch.tail).sum(-1)
        speed = (canvas - batch.num_forwards.minimum(canvas) + 1) / canvas
        value = rewards.solved * speed**self.config.alpha
        return advantage.group_mean(value.float(), batch.group, rewards.included, batch.episode)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """None: no token is scored."""
        return masking.no_draws(batch.completion)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J."""
        c, batch = self.config, experience.batch
        assert new.choice_logp is not None and experience.old.choice_logp is not None, "needs.trains"
        happened = torch.arange(new.choice_logp.shape[1]) < batch.num_forwards[:, None]
        log_ratio = self._mixed(new.choice_logp, batch) - self._mixed(experience.old.choice_logp, batch)
        weight = experience.advantage[:, None]
        counts = experience.counts
        gain = surrogate.reduce(c.gain(log_ratio, weight, happened, batch.group), happened, "sequence_mean", counts)
        metrics = surrogate.ratio_metrics(log_ratio, weight, c, happened, counts.num_choices)
        return Loss(-gain, metrics)

    def _mixed(self, choice_logp: Tensor, batch: RolloutBatch) -> Tensor:
        """(N, T) log-probabilities under the mixture that the rows of a group were drawn from."""
        experts = len(self.config.experts or [])
        if not experts or batch.expert is None:
            return choice_logp
        total = advantage.group_size(batch.group)[:, None].clamp(min=experts + 1)
        logp = choice_logp + ((total - experts) / total).log()
        return torch.where(batch.expert[:, None], torch.logaddexp(logp, -total.log()), choice_logp)
