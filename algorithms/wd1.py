"""wd1: weighted log-likelihood; what is better than its group is imitated, what is worse unlearned.

    w+_g = softmax_g(psi R),   w-_g = softmax_g(-psi R)            within the group; a baseline would cancel
    J = mean over groups of  sum_g (w+_g - w-_g) sum_i phi_gi
    phi_i(theta) = log p_theta(x_i | prompt with 15% of its tokens masked, completion fully masked)

Only the current policy is scored: no ratio, no clip, no divergence. As an advantage it is  A_g = G (w+_g - w-_g)  for
groups of G: about 2 psi (R - mean) where psi R is small, never beyond G where it is large.

Source: Tang et al. 2025 (wd1), arXiv:2507.08838; the released trainer without a reference policy (wll_d1_neg).
Deviation: the softmax is over the group, where the released code takes the rows of a device (one group in its
settings). Nothing bounds w- log p from below: watch the likelihood of bad rows.
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


class WD1(Algorithm):
    """Softmax weights instead of ratios."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        psi: float = 1.0  # inverse temperature of the weights, per unit of reward
        prompt_mask_rate: float = 0.15  # share of prompt tokens masked in the scored view
        fresh_masks: bool = True  # new draws at every update of a step; else all of them see one mask, and learn it
        reduction: surrogate.Reduction = "sequence_sum"

        def __post_init__(self) -> None:
            ranges.positive(psi=self.psi)
            if not 0 <= self.prompt_mask_rate < 1:
                raise UserError(f"prompt_mask_rate = {self.prompt_mask_rate}: must be in [0, 1)")

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(old=False, fresh_masks=self.config.fresh_masks)

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """A = G (w+ - w-)."""
        rows = batch.group, rewards.included, batch.episode
        scaled = self.config.psi * rewards.total
        return advantage.group_softmax(scaled, *rows) - advantage.group_softmax(-scaled, *rows)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """One view: the completion masked, and some of the prompt."""
        prompt = batch.valid & ~batch.completion & ~batch.tail
        prompt[:, 0] = False  # families that predict the next position cannot hide the first one
        rate = self.config.prompt_mask_rate
        sample = masking.fully_masked(batch.completion, prompt=prompt, prompt_mask_rate=rate, generator=generator)
        return sample.also_masking(batch.tail)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J."""
        assert experience.advantage.dim() < 3, "one draw"
        gain = advantage.per_token(experience.advantage) * new.token_logp
        where = experience.batch.completion
        return Loss(-surrogate.reduce(gain, where, self.config.reduction, experience.counts))
