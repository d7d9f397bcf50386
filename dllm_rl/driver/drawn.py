"""Scored rollouts on their way to a batch: rows that are joined, selected and collated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dllm_rl.config.schema import Config
from dllm_rl.data.collate import collate
from dllm_rl.diffusion.advantage import decoupled
from dllm_rl.driver.build import Run
from dllm_rl.protocols.rollouter import Turn
from dllm_rl.types import Rewards, RolloutBatch


@dataclass(frozen=True, slots=True)
class Drawn:
    """Scored rollouts before they are a batch; one entry per row."""

    turns: list[Turn]
    expert: list[bool]
    rewards: Rewards

    @staticmethod
    def join(first: Drawn, second: Drawn) -> Drawn:
        """The rows of both; the second's episodes are numbered after the first's."""
        after = max((turn.episode for turn in first.turns), default=-1) + 1
        return Drawn(
            first.turns + [dataclasses.replace(turn, episode=after + turn.episode) for turn in second.turns],
            first.expert + second.expert,
            Rewards.join(first.rewards, second.rewards),
        )

    def select(self, rows: Sequence[int]) -> Drawn:
        """These rows, in this order."""
        return Drawn(
            [self.turns[row] for row in rows],
            [self.expert[row] for row in rows],
            self.rewards.select(torch.tensor(rows, dtype=torch.int64)),
        )


def collated(run: Run, drawn: Drawn) -> RolloutBatch:
    """The rows as a batch."""
    return collate(
        [turn.trajectory for turn in drawn.turns],
        run.denoiser,
        group=[turn.group for turn in drawn.turns],
        expert=drawn.expert,
        episode=[turn.episode for turn in drawn.turns],
        turn=[turn.turn for turn in drawn.turns],
    )


def normalised(run: Run, config: Config, rewards: Rewards, batch: RolloutBatch) -> Rewards:
    """The rewards as an algorithm is given them: as they are, or decoupled."""
    if config.reward_normalisation == "total":
        return rewards
    assert run.reward_pool is not None, "it has scored"
    return decoupled(rewards, run.reward_pool.weights, batch)
