"""A package of somebody else's: methods that use what only some methods need, one each."""

from __future__ import annotations

import dataclasses

import torch

from algorithms.coupled_grpo import CoupledGRPO
from algorithms.trace_rl import TraceRL
from dllm_rl.diffusion import advantage, masking, surrogate
from dllm_rl.protocols.algorithm import Algorithm, ExtraRollout, Needs
from dllm_rl.types import Loss


class OneExpert(CoupledGRPO):
    """Extra rollouts: every prompt is decoded once more, left to right, and joins its group."""

    def extra_rollouts(self, prompts, rewards, batch, *, canvas, generator):
        return [
            ExtraRollout(group=group, prompt=prompt, strategy={"name": "left_to_right"})
            for group, prompt in enumerate(prompts)
        ]

    def select_rows(self, extra, rewards, batch, generator):
        return torch.arange(len(batch))


class WithValues(TraceRL):
    """A value baseline of its own: the mean of what the model predicts for a row."""

    value_clip = 0.5

    @property
    def needs(self):
        return dataclasses.replace(super().needs, values=True, group_size=1)

    def credit(self, rewards, batch, value):
        target = rewards.total[:, None].expand_as(value) * batch.generated
        mean = (value * batch.generated).sum(-1, keepdim=True) / batch.generated.sum(-1, keepdim=True).clamp(min=1)
        return (target - mean) * batch.generated, target


class LogSum(Algorithm):
    """Per-draw log-probabilities, as SPG has them: an upper bound log mean_k exp B_k where A < 0."""

    @property
    def needs(self):
        return Needs(draws=True)

    def advantages(self, rewards, batch):
        return advantage.group_mean(rewards.total, batch.group, rewards.included, batch.episode)

    def masks(self, batch, generator, update=0):
        return masking.complementary_count(batch.completion, pairs=2, generator=generator).also_masking(batch.tail)

    def loss(self, new, experience):
        length = experience.batch.completion.sum(-1)
        weighted = experience.masks.weight * new.draw_token_logp * len(experience.masks.weight)
        bounds = weighted.sum(-1) / length  # (K, N)
        upper = bounds.logsumexp(0) - torch.tensor(float(len(bounds))).log()
        value = torch.where(experience.advantage < 0, upper, surrogate.sequence_logp(new, experience) / length)
        return Loss(-(experience.advantage * value).sum() / experience.counts.num_rows)


class FreshMasks(CoupledGRPO):
    """New masks at each optimiser update."""

    @property
    def needs(self):
        return dataclasses.replace(super().needs, fresh_masks=True)


class PerDrawAdvantages(CoupledGRPO):
    """Advantages of (draw, token): the second draw of each pair counts double."""

    def advantages(self, rewards, batch):
        rows = advantage.leave_one_out(rewards.total, batch.group, rewards.included, batch.episode)
        return torch.tensor([1.0, 2.0])[:, None, None] * rows[:, None].expand(batch.tokens.shape)

    @property
    def needs(self):
        return Needs(draws=True)

    def loss(self, new, experience):
        gain = experience.masks.weight * new.draw_token_logp * experience.advantage
        return Loss(-gain.sum() / experience.counts.num_tokens)
