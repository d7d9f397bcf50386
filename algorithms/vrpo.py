"""VRPO: DPO whose likelihoods are ELBOs, with the noise of the preference score kept down.

    B(theta) = 1/n sum_{k=1..n} C/n_k sum_{i in M_k} log p_theta(x_i | M_k masked),   counts n_k stratified over 1..C
    s = beta [ (B(chosen) - B_ref(chosen)) - (B(rejected) - B_ref(rejected)) ]
    loss = mean_pairs [ - log sigmoid(s) - nu B(chosen) / C ]

All of the budget goes into masking rates (n rates with one mask each), policy and reference share the draws, chosen and
rejected have draws of their own.

Source: Zhu et al. 2025 (LLaDA 1.5), arXiv:2505.19223. The code is not public; likelihoods are sums over the completion,
not divided by its length. Deviation: the supervised anchor is per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.config import ranges
from dllm_rl.diffusion import masking, surrogate
from dllm_rl.protocols.algorithm import Algorithm, Needs
from dllm_rl.types import Experience, LikelihoodEstimate, Loss, MaskSample, Rewards, RolloutBatch


class VRPO(Algorithm):
    """Variance-reduced preference optimisation."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        draws: int = 8  # n, masking rates per likelihood
        beta: float = 0.2  # scale of the preference score
        anchor: float = 0.05  # nu, weight of the supervised loss on chosen completions

        def __post_init__(self) -> None:
            ranges.at_least_one(draws=self.draws)
            ranges.positive(beta=self.beta)
            ranges.not_negative(anchor=self.anchor)

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(old=False, source="pairs", reference=True)

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """+1 for chosen, -1 for rejected rows; the loss reads only the sign."""
        return torch.where(rewards.total >= 1, 1.0, -1.0)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """Independent draws for every row."""
        return masking.uniform_count(batch.completion, draws=self.config.draws, generator=generator)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """The preference loss and its anchor."""
        assert experience.reference is not None, "VRPO needs the reference"
        num_pairs = experience.counts.num_rows / 2
        bound = surrogate.sequence_logp(new, experience)
        gain = bound - surrogate.sequence_logp(experience.reference, experience)
        chosen = experience.advantage > 0
        score = self.config.beta * (gain[chosen] - gain[~chosen])  # rows 2j and 2j + 1 are a pair
        per_token = bound[chosen] / experience.batch.completion[chosen].sum(-1)
        loss = -torch.nn.functional.logsigmoid(score) - self.config.anchor * per_token
        metrics = {
            "preference_accuracy": (score > 0).float().sum() / num_pairs,
            "preference_margin": score.detach().sum() / num_pairs,
        }
        return Loss(loss.sum() / num_pairs, metrics)
