"""ESPO: GRPO on whole sequences, whose likelihood is an ELBO from complementary counts.

    n ~ U{0..C},  M a uniform n-subset of the C completion tokens
    B(theta) = mean over pairs of 1/2 [ (C+1)/n sum_{i in M} log p(x_i | M masked)
                                      + (C+1)/(C-n) sum_{i not in M} log p(x_i | the others masked) ]
    J = mean_rows [ min(r A, clip(r, 1-eps, 1+eps) A) - beta (B - B_ref)^2 / 2 / C ],   r = exp((B - B_old) / C)
    A = R - mean of the other rows of its group

Source: ESPO, arXiv:2512.03759.
Deviation: C is the row's own length up to EOS, where the released code scores the whole canvas and divides by it: a
token of a short answer counts as much as one of a long answer there (``paper_exact``, or ``scope`` and ``norm``).
Counts are stratified over the draws of a row, where it stratifies over the rows of a batch. Epsilon is of the size of
log-ratios per token (its demonstration scripts' 4e-4), where its training scripts use 0.2, which never clips.
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


class ESPO(Algorithm):
    """A completion is one action."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        pairs: int = 2  # complementary pairs per likelihood: 2 * pairs forwards
        fresh_masks: bool = True  # new draws at every update of a step; else all of them see one mask, and learn it
        epsilon: float = 4e-4  # clip half-width of the length-normalised ratio
        beta: float = 1e-3  # weight of the k2 divergence from the reference, per token
        divergence: surrogate.Divergence = "k2"  # k3 explodes on sums, k1 oscillates
        scope: surrogate.Scope = "completion"  # tokens that B sums over; the canvas holds what follows the end too
        norm: surrogate.Norm = "length"  # C in the ratio: the row's own length, its canvas, or none
        paper_exact: bool = False  # the released code's canvas in both

        def __post_init__(self) -> None:
            ranges.at_least_one(pairs=self.pairs)
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
        """Leave-one-out, not divided by the deviation."""
        return advantage.leave_one_out(rewards.total, batch.group, rewards.included, batch.episode)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """Each token is scored once per pair, in the view that hides it."""
        where = surrogate.scored_tokens(batch, self._scope)
        sample = masking.complementary_count(where, pairs=self.config.pairs, generator=generator)
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
            ratio_norm="canvas" if c.paper_exact else c.norm,
            kind=c.divergence,
            scope=self._scope,
        )
