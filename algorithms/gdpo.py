"""GDPO: GRPO on whole sequences, whose ELBO integrates the masking rate by quadrature.

    B(theta) = sum_q w_q C/n_q sum_{i in M_q} log p(x_i | M_q masked),   n_q = round(t_q C),  (t_q, w_q) Gauss-Legendre
    J = mean_rows [ 1/C min(r A, clip(r, 1-eps, 1+eps) A) - beta D(B, B_ref) / C ],   r = exp(B - B_old)
    A = R - mean_group(R)

Source: Rojas et al. 2025 (GDPO), arXiv:2510.08554.
Deviation: the weights use the realised count n_q; the draws are shared by old, reference and current policy, which the
released code means to do and does not; the divergence is k2. ``paper_exact: true`` is the released form of the
estimator and the ratio: count floor(t_q C) with weight 1/t_q, r = exp((B - B_old) / C) without 1/C in front, and C the
whole canvas with what follows EOS (``scope`` and ``norm`` alone).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion import advantage, masking, surrogate
from dllm_rl.errors import UserError
from dllm_rl.protocols.algorithm import Algorithm, Needs
from dllm_rl.types import Experience, LikelihoodEstimate, Loss, MaskSample, Rewards, RolloutBatch


class GDPO(Algorithm):
    """Sequence-level GRPO on a semi-deterministic ELBO."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        nodes: int = 3  # Gauss-Legendre nodes, 1..5: forwards per likelihood and mask
        draws: int = 1  # masks per node
        fresh_masks: bool = True  # new draws at every update of a step; else all of them see one mask, and learn it
        epsilon: float = 0.5  # clip half-width of the ratio
        beta: float = 0.0  # weight of the k2 divergence from the reference, per token
        scope: surrogate.Scope = "completion"  # tokens that B sums over; the canvas holds what follows the end too
        norm: surrogate.Norm = "length"  # C in front of the gain: the row's own length, its canvas, or none
        paper_exact: bool = False  # the released code's weights, ratio and canvas

        def __post_init__(self) -> None:
            if not 1 <= self.nodes <= 5:
                raise UserError(f"nodes = {self.nodes}: must be 1..5")
            ranges.at_least_one(draws=self.draws)
            surrogate.Clipping.__post_init__(self)
            ranges.not_negative(beta=self.beta)

    config: Config

    @property
    def _scope(self) -> surrogate.Scope:
        return "canvas" if self.config.paper_exact else self.config.scope

    @property
    @override
    def needs(self) -> Needs:
        fresh = self.config.fresh_masks
        return Needs(reference=self.config.beta > 0, fresh_masks=fresh, row_credit=True)  # only the KL term reads it

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """A = R - mean of the group, not divided by the deviation."""
        return advantage.group_mean(rewards.total, batch.group, rewards.included, batch.episode)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """One view per node and draw."""
        c = self.config
        where = surrogate.scored_tokens(batch, self._scope)
        sample = masking.quadrature(where, nodes=c.nodes, draws=c.draws, floor=c.paper_exact, generator=generator)
        return sample.also_masking(batch.tail & ~where)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J and the mean KL."""
        c = self.config
        return surrogate.sequence_clipped_loss(
            new,
            experience,
            epsilon=c,
            beta=c.beta,
            ratio_norm="canvas" if c.paper_exact else "none",
            loss_norm="none" if c.paper_exact else c.norm,
            scope=self._scope,
        )
