"""DCoLT: the model and the order of its unmasking are trained together, a decoding step being one action.

    U_s  = the ordered positions that forward s committed
    l_s  = log pi_phi(U_s | state s) + sum_{i in U_s} log p_theta(x_i | state s)
    J    = mean_rows [ 1/T sum_s min(r_s A, clip(r_s, 1-eps, 1+eps) A) ],   r_s = exp(l_s - l_old_s)
    A    = (R - mean_group(R)) / std_group(R)

pi_phi is the policy of the strategy ``learned``. With ``distribution: ranking`` it is the paper's Plackett-Luce model,
which ranks sampling.tokens_per_step positions; a step that had no choice has log pi = 0. Its other distributions also
decide how many. With one update per batch all ratios are 1: REINFORCE on the trajectory's own probability.

Source: Huang et al. 2025 (DCoLT), arXiv:2505.10446, and its released training code (LLaDOU).
Deviation: the paper's policy is a layer on the last hidden states, through which its gradient reaches the model; here
it sees the confidences that decoding recorded (rollouts/policy_network.py), so that choices cost no forward of the
model. Tokens after EOS are not scored, but that they were chosen is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.diffusion import advantage, masking, surrogate
from dllm_rl.errors import UserError
from dllm_rl.protocols.algorithm import Algorithm, Needs, Plan
from dllm_rl.types import Experience, LikelihoodEstimate, Loss, MaskSample, Rewards, RolloutBatch


class DCoLT(Algorithm):
    """GRPO on steps: which positions to unmask, and with which tokens."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(surrogate.Clipping):
        """Options."""

        epsilon: float = 0.2  # clip half-width of the ratio of a step, dimensionless
        advantage: Literal["z_score", "group_mean"] = "z_score"

    config: Config

    @property
    @override
    def needs(self) -> Needs:
        return Needs(trains=frozenset({"model", "policy"}), trajectory=True)

    @override
    def check_plan(self, plan: Plan) -> None:
        """Somebody must choose positions, and tokens must be samples."""
        if not plan.has_policy:
            raise UserError(
                f"algorithm 'dcolt' trains the network of an unmasking strategy beside the model, and "
                f"'{plan.strategy}' has none; set sampling.strategy to {{name: learned, distribution: ranking}}"
            )
        if plan.sampling.temperature == 0:
            raise UserError(
                "sampling.temperature = 0: algorithm 'dcolt' gives credit to tokens too, so they must be sampled; set "
                "sampling.temperature to 1.0, or train the policy alone with algorithm: {name: unmasking_policy}"
            )

    @override
    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """Centred in the group, by default over its deviation too; groups of equal rewards give 0."""
        if self.config.advantage == "z_score":
            return advantage.normalised(rewards, batch)
        return advantage.group_mean(rewards.total, batch.group, rewards.included, batch.episode)

    @override
    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """One draw per decoding step; for block-causal models one draw holds a step of every block."""
        return masking.along_trajectory(batch.unmask_step, batch.generated, block_ids=batch.block_ids)

    @override
    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """-J."""
        c, batch, counts = self.config, experience.batch, experience.counts
        assert new.choice_logp is not None and experience.old.choice_logp is not None, "needs.trains"
        assert experience.advantage.dim() < 3, "a token is scored in one draw"
        forwards = new.choice_logp.shape[1]
        happened = torch.arange(forwards) < batch.num_forwards[:, None]
        log_ratio = new.choice_logp - experience.old.choice_logp
        log_ratio = log_ratio + _of_forwards(new.token_logp - experience.old.token_logp, batch, forwards)
        value = advantage.per_token(experience.advantage)
        if (
            value.shape[1] > 1
        ):  # credit per token: a forward has the mean of its tokens', or of the row's if it has none
            size = _of_forwards(torch.ones_like(value), batch, forwards)
            own = _of_forwards(value, batch, forwards)
            whole = own.sum(-1, keepdim=True) / size.sum(-1, keepdim=True).clamp(min=1)
            value = torch.where(size > 0, own / size.clamp(min=1), whole)
        gain = surrogate.reduce(c.gain(log_ratio, value, happened, batch.group), happened, "sequence_mean", counts)
        return Loss(-gain, surrogate.ratio_metrics(log_ratio, value, c, happened, counts.num_choices))


def _of_forwards(value: Tensor, batch: RolloutBatch, forwards: int) -> Tensor:
    """(N, T) sums of (N, L) over the completion tokens that each forward committed."""
    where = batch.generated
    step = batch.unmask_step.masked_fill(~where, 0)
    return value.new_zeros(len(batch), forwards).scatter_add(1, step, torch.where(where, value, 0.0))
