"""UniGRPO: GRPO on partly masked completions, whose masking rates form a grid over the updates of a step.

    t_1 ~ U[0, 1],  t_n = t_1 + (n-1)/(mu-1) (1 - t_1)     rate of update n of mu: from the start to fully masked
    M_n           a uniform subset of round(t_n C) of the C completion tokens; the prompt stays visible
    l_i           log p_theta(x_i | x with M_n masked),   r_i = exp(l_i - l_old_i)
    J = mean_rows [ 1/|M_n| sum_{i in M_n} ( min(r_i A, clip(r_i, 1-eps, 1+eps) A) - beta k3(l_i, l_ref_i) ) ]
    A = (R - mean_group(R)) / std_group(R)

A token is scored where it is masked, without the weight 1/t in its ratio: C/|M_n| stands outside of the clip, so that
J is an unbiased estimate of the mean over all tokens.

Source: Yang et al. 2025 (MMaDA), arXiv:2505.15809, Eqs. 3-5, 15 and 16, Algorithm 1. Its training code is not public.
The paper has two grids: Algorithm 1 ends fully masked (``grid: to_full``), Section 5.2 spaces the rates by 1/mu over
all of [0, 1], t_n = t_1 + (n-1)/mu modulo 1 (``grid: whole_range``).
Deviation: a start per row, not per prompt; counts are exact and at least 1, where the paper masks an unsaid way on a
grid of 1,000 timesteps. The paper gives no epsilon, beta or mu; the defaults are those of diffu-GRPO (d1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion import advantage, masking, per_draw, surrogate
from dllm_rl.protocols.algorithm import Algorithm, Needs
from dllm_rl.types import Experience, LikelihoodEstimate, Loss, MaskSample, Rewards, RolloutBatch


class UniGRPO(Algorithm):
    """GRPO with structured noising; mu is learner.updates_per_step."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        grid: Literal["to_full", "whole_range"] = "to_full"  # masking rates of a step's updates, as said above
        epsilon: float = 0.5  # clip half-width of the ratio, dimensionless
        beta: float = 0.04  # weight of KL(new || reference), nats per token

        def __post_init__(self) -> None:
            surrogate.Clipping.__post_init__(self)
            ranges.not_negative(beta=self.beta)

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(reference=self.config.beta > 0, fresh_masks=True, draws=True)  # only the KL term reads it

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """Normalised within the group; groups of equal rewards give 0."""
        return advantage.normalised(rewards, batch)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """The view of a step with one update, at a rate from U[0, 1]."""
        return self.joint_masks(batch, generator, 1)[0]

    def joint_masks(self, batch: RolloutBatch, generator: torch.Generator, updates: int) -> Sequence[MaskSample]:
        """One view per update; a row's rates share their random start."""
        start = torch.rand(len(batch), generator=generator, dtype=torch.float64).to(batch.tokens.device)
        return [
            masking.at_rate(batch.completion, rate, generator=generator).also_masking(batch.tail)
            for rate in self._rates(start, updates)
        ]

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J and the mean KL."""
        # The mean over a row's completion of what weighs C/|M| where masked is the mean over its masked tokens.
        c = self.config
        return per_draw.clipped_loss(new, experience, epsilon=c, beta=c.beta, reduction="sequence_mean")

    def _rates(self, start: Tensor, updates: int) -> list[Tensor]:
        """(N,) masking rates of each update, from (N,) starts."""
        if self.config.grid == "whole_range":
            return [(start + n / updates) % 1.0 for n in range(updates)]
        return [start + n / max(1, updates - 1) * (1 - start) for n in range(updates)]
