"""SPG: policy gradient on a lower bound of the likelihood for good rows, and on an upper bound for bad ones.

    b_i = sum_k w_ki log p_ki                                              lower bound (ELBO) of token i
    u_i = W_i/beta log( sum_k w_ki/W_i p_ki^beta ),  W_i = sum_k w_ki      upper bound (EUBO), beta >= 1
    J = mean_i A c_i,   c_i = b_i where A >= 0, else (1 - m) b_i + m u_i
    A = R - mean_group(R)

p_ki is the probability of token i in draw k: a random block is masked in part, earlier blocks are clean, later ones
masked; all that is masked is scored, with the weights of masking.blockwise_count. Block-causal models score all their
blocks in every draw. There is no ratio, no clip and no divergence. u_i >= b_i for any draws, and equal where one draw
scores the token. With more draws W_i tends to 1, and u_i to the paper's  1/beta log E[w p^beta].  In one block the sums
bound the log-likelihood, from above once beta reaches its length (before that, up to a constant). With several blocks,
tokens of later ones are also scored with more masked than decoding sees, as in the paper.

Source: Wang et al. 2025 (SPG), arXiv:2510.09541, Algorithm 1 and Eq. 2 and 7.
Deviation: every token weighs the same in expectation. ``paper_exact: true`` is the released form, where every draw
does: the ELBO is the mean over the scored tokens of each draw, the EUBO (but for a constant) the mean over tokens that
are scored at all, each times the length, and tokens of earlier blocks that are masked as context are scored too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion import advantage, layout, masking, surrogate
from dllm_rl.errors import UserError
from dllm_rl.protocols.algorithm import Algorithm, Needs
from dllm_rl.types import Experience, LikelihoodEstimate, Loss, MaskSample, Metric, Rewards, RolloutBatch


class SPG(Algorithm):
    """REINFORCE between two bounds."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        draws: int = 2  # noised copies per likelihood
        fresh_masks: bool = True  # new draws at every update of a step; else all of them see one mask, and learn it
        block_size: int = 32  # tokens; block-causal models have their own
        context_mask_rate: float = 0.15  # share of the prompt and of earlier blocks that is masked as well, not scored
        mixture: float = 0.5  # m, share of the upper bound where A < 0; 1 = it alone, 0 = the lower bound everywhere
        eubo_beta: float = 1.5  # exponent of the upper bound; nearer to 1 is tighter
        reduction: surrogate.Reduction = "token_mean"
        paper_exact: bool = False  # the released code's scored tokens and weights

        def __post_init__(self) -> None:
            ranges.at_least_one(draws=self.draws, block_size=self.block_size)
            for name, value in (("context_mask_rate", self.context_mask_rate), ("mixture", self.mixture)):
                if not 0 <= value <= 1:
                    raise UserError(f"{name} = {value}: must be in [0, 1]")
            if self.eubo_beta < 1:
                raise UserError(f"eubo_beta = {self.eubo_beta}: must be at least 1, or it is no upper bound")

    config: Config
    metrics: ClassVar[Mapping[str, Metric]] = {
        "bound_gap": Metric("nats", "upper minus lower bound of a token's log-likelihood; 0 with one draw")
    }

    @property
    @override
    def needs(self) -> Needs:
        return Needs(old=False, draws=True, fresh_masks=self.config.fresh_masks)  # U is not a sum over draws

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """A = R - mean of the group, not divided by the deviation."""
        return advantage.group_mean(rewards.total, batch.group, rewards.included, batch.episode)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """Block by block, with some of what comes before the block masked too."""
        c, where, ids = self.config, batch.completion, batch.block_ids
        blocks = layout.block_index(batch.prompt_length, where.shape[1], c.block_size) if ids is None else ids
        sample = masking.blockwise_count(where, blocks, draws=c.draws, together=ids is not None, generator=generator)
        first = torch.where(sample.mask, blocks, blocks.max()).amin(-1, keepdim=True)  # (K, N, 1)
        context = batch.valid & (blocks < first)
        context[..., 0] = False  # families that predict the next position cannot hide the first one
        noise = torch.rand(context.shape, generator=generator, dtype=torch.float64).to(where.device)
        mask = sample.mask | batch.tail | (context & (noise < c.context_mask_rate))
        if not c.paper_exact:
            return MaskSample(mask=mask, weight=sample.weight)
        scored = mask & where
        share = scored.sum(-1, keepdim=True) / where.sum(-1, keepdim=True)
        return MaskSample(mask=mask, weight=(scored / share / c.draws).float())

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J and the mean distance of the bounds."""
        c, where, counts = self.config, experience.batch.completion, experience.counts
        assert new.draw_token_logp is not None, "needs.draws"
        assert experience.advantage.dim() < 3, "the bounds are not sums over draws"
        weight = experience.masks.weight.to(new.draw_token_logp)
        total = weight.sum(0)
        lower = (weight * new.draw_token_logp).sum(0)
        mean = power_mean(new.draw_token_logp, weight, c.eubo_beta)
        gap = surrogate.reduce((total * mean - lower).detach(), where, "token_mean", counts)
        upper = mean * (_share_of_covered(total > 0, where) if c.paper_exact else total)
        value = advantage.per_token(experience.advantage)
        bound = torch.where(value >= 0, lower, lower + c.mixture * (upper - lower))
        return Loss(-surrogate.reduce(value * bound, where, c.reduction, counts), {"bound_gap": gap})


def power_mean(logp: Tensor, weight: Tensor, beta: float) -> Tensor:
    """(N, L) nats: 1/beta log( sum_k w_k/W p_k^beta ) with W = sum_k w_k; 0 where no draw has a weight.

    Args:
        logp: (K, N, L) nats.
        weight: (K, N, L), not negative.
        beta: exponent; at 1 the log of the mean probability, towards 0 the mean log-probability.
    """
    total = weight.sum(0)
    terms = torch.where(weight > 0, beta * logp + (weight / total).log(), -torch.inf)
    return torch.where(total > 0, terms.logsumexp(0), 0.0) / beta


def _share_of_covered(covered: Tensor, where: Tensor) -> Tensor:
    """(N, L): tokens of the row over its covered tokens where covered, else 0."""
    return covered * where.sum(-1, keepdim=True) / covered.sum(-1, keepdim=True).clamp(min=1)
