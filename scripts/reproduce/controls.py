"""Algorithms that nobody should train with: each takes one ingredient away, to see what it was worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from algorithms.coupled_grpo import CoupledGRPO
from algorithms.igpo import IGPO
from algorithms.trace_rl import TraceRL
from dllm_rl.protocols.algorithm import ExtraRollout
from dllm_rl.types import Prompt, Rewards, RolloutBatch


class ShuffledTraceRL(TraceRL):
    """TraceRL with the advantages of each group dealt out at random: same rollouts, same step sizes, no information."""

    def __init__(self, config: TraceRL.Config) -> None:
        super().__init__(config)
        self._generator = torch.Generator().manual_seed(0)

    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """A permutation of TraceRL's advantages within every group."""
        advantage = super().advantages(rewards, batch)
        shuffled = advantage.clone()
        for number in batch.group.unique():
            rows = (batch.group == number).nonzero().flatten()
            shuffled[rows] = advantage[rows[torch.randperm(len(rows), generator=self._generator)]]
        return shuffled


class CreditedCoupledGRPO(CoupledGRPO):
    """Coupled-GRPO told which tokens of a failed row were wrong; its tokens that were right get no advantage.

    Every puzzle has one solution, so a solved row of the group says what is right. Rows of groups without a solved row
    have advantage 0 anyway.
    """

    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """(N, L): the row's advantage, but 0 on the right tokens of failed rows."""
        advantage = super().advantages(rewards, batch)
        credited = advantage[:, None].expand(batch.tokens.shape).clone()
        for number in batch.group.unique():
            rows = (batch.group == number).nonzero().flatten()
            solved = rows[rewards.total[rows] >= 1]
            if len(solved):
                right = batch.tokens[rows] == batch.tokens[solved[0]]
                failed = (rewards.total[rows] < 1)[:, None]
                credited[rows] = credited[rows].masked_fill(right & failed, 0.0)
        return credited


class WithoutHints(IGPO):
    """IGPO's likelihood, ratio and loss, without its hints: the GRPO that it is compared with."""

    @override
    def extra_rollouts(self, prompts: Sequence[Prompt], *arguments: Any, **options: Any) -> Sequence[ExtraRollout]:
        return ()
