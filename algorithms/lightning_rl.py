"""LightningRL: accuracy and speed as two rewards, each normalised on its own, and an anchor on what was right.

    A = z_group(R) + w z_group(TPF),    TPF = completion tokens / forwards
    J = mean_rows [ 1/C sum_i min(r_i A, clip(r_i, 1-eps, 1+eps) A) ] - beta mean_i k3(l_i, l_ref_i)
        + nu mean_i 1[row solved] l_i,       l_i along the decoding trajectory,  r_i = exp(l_i - l_old_i)
    kept: groups with a solved row, and a spread of TPF of at least delta

Source: LightningRL, arXiv:2603.13319.
Deviation: the released code takes "reward >= 0" for "solved", so that fast wrong rows are imitated; here the verifier's
flag travels with the row. The anchor is divided by all scored tokens, not by those of solved rows, so that it does not
depend on sharding. ``paper_exact: true`` has the released likelihood (every block fully masked, one forward) and its
second normalisation of A over the batch.
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


class LightningRL(Algorithm):
    """GRPO for tokens per forward without losing accuracy."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        speed: float = 1.0  # weight w of tokens per forward beside the reward, both as z-scores
        min_spread: float = 0.01  # delta, tokens per forward; groups that all decode at one speed are dropped
        epsilon: float = 0.2  # clip half-width of the ratio, dimensionless
        max_log_ratio: float = 10.0  # nats, as released
        beta: float = 0.01  # weight of KL(new || reference), nats per token
        anchor: float = 0.1  # nu, weight of the log-likelihood of solved rows
        paper_exact: bool = False  # the released code's one-step likelihood and batch normalisation

        def __post_init__(self) -> None:
            surrogate.Clipping.__post_init__(self)
            ranges.not_negative(speed=self.speed, min_spread=self.min_spread, beta=self.beta, anchor=self.anchor)

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        # The released likelihood does not replay the trajectory.
        return Needs(reference=self.config.beta > 0, trajectory=not self.config.paper_exact)

    @override
    def keep(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """Groups that have something to imitate, and speeds to choose from."""
        ok = rewards.included
        solved = advantage.any_of_group(rewards.solved & ok, batch.group)
        spread = advantage.spread_of_group(batch.tokens_per_forward, batch.group, ok, batch.episode)
        return ok & solved & (spread >= self.config.min_spread)

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """The sum of two z-scores, so that neither reward drowns the other."""
        speed = advantage.z_score(batch.tokens_per_forward, batch.group, rewards.included, batch.episode)
        value = advantage.normalised(rewards, batch) + self.config.speed * speed
        if self.config.paper_exact:
            value = advantage.z_score(value, torch.zeros_like(batch.group), self.keep(rewards, batch), batch.episode)
        return value

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """The states that the sampler visited."""
        if self.config.paper_exact:
            return masking.fully_masked(batch.completion).also_masking(batch.tail)
        return masking.along_trajectory(batch.unmask_step, batch.generated, block_ids=batch.block_ids)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J with its parts."""
        c, where, counts = self.config, experience.batch.completion, experience.counts
        policy = surrogate.clipped_loss(new, experience, epsilon=c, beta=0.0, reduction="sequence_mean")
        value, metrics = policy.value, dict(policy.metrics)
        if c.beta > 0:
            assert experience.reference is not None, "beta > 0 means needs.reference"
            kl = surrogate.divergence(new.token_logp, experience.reference.token_logp, "k3")
            metrics["kl"] = surrogate.reduce(kl.detach(), where, "token_mean", counts)
            value = value + c.beta * surrogate.reduce(kl, where, "token_mean", counts)
        if c.anchor > 0:
            solved = where & experience.rewards.solved[:, None]
            value = value - c.anchor * surrogate.reduce(new.token_logp, solved, "token_mean", counts)
        return Loss(value, metrics)
