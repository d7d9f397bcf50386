"""An algorithm with a metric of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dllm_rl.diffusion import advantage, masking, surrogate
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.types import Loss, Metric


class OneViewGRPO(Algorithm):
    """GRPO whose likelihood comes from the fully masked completion."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        epsilon: float = 0.2

    metrics: ClassVar = {"acme/surprise": Metric("nats", "mean negative log-probability of a scored token")}

    def advantages(self, rewards, batch):
        return advantage.leave_one_out(rewards.total, batch.group, rewards.included, batch.episode)

    def masks(self, batch, generator, update=0):
        return masking.fully_masked(batch.completion, generator=generator).also_masking(batch.tail)

    def loss(self, new, experience):
        found = surrogate.clipped_loss(new, experience, epsilon=self.config.epsilon, beta=0.0, reduction="token_mean")
        surprise = -new.token_logp.detach().sum() / experience.counts.num_tokens
        return Loss(found.value, {**found.metrics, "acme/surprise": surprise})


class Forgetful(OneViewGRPO):
    """Logs what it has not declared."""

    metrics: ClassVar = {}
