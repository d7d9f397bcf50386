"""The contract of training methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dllm_rl.types import (
    Example,
    Experience,
    LikelihoodEstimate,
    Loss,
    MaskSample,
    Prompt,
    Rewards,
    RolloutBatch,
    Sampling,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an algorithm may look at before anything starts, to refuse what cannot work.

    Attributes:
        sampling: decoding while training.
        strategy: name of the unmasking strategy while training.
        has_policy: whether that strategy has a network to train.
        examples: the training rows.
        task: name of the task.
    """

    sampling: Sampling
    strategy: str
    has_policy: bool
    examples: Sequence[Example]
    task: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraRollout:
    """A rollout that an algorithm asks for in view of the ordinary ones.

    Attributes:
        group: number of the group that it joins.
        prompt: decoded once, perhaps with injected tokens.
        strategy: name and options of another unmasking strategy: the row is then an expert's (RolloutBatch.expert);
            None = the one of the run.
        block_size: decoding block of an expert, tokens; None = the run's.
    """

    group: int
    prompt: Prompt
    strategy: Mapping[str, Any] | None = None
    block_size: int | None = None


class Algorithm:
    """A training method: which noised copies are scored, how rewards become advantages, and the loss.

    Attributes:
        source: "rollouts" trains on fresh samples, "demonstrations" on reference completions, "pairs" on preferences:
            rows 2j and 2j + 1 are then the chosen and the rejected completion of pair j, with rewards 1 and 0.
        min_group: fewest samples per prompt from which its advantages can learn; 1 if they need no group.
        trains: "model", or "policy": the unmasking strategy's network, with the model frozen. Likelihoods are then
            (N, T) log-probabilities of the choice of each forward, and rows need no draws.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options of the algorithm."""

    source: ClassVar[Literal["rollouts", "demonstrations", "pairs"]] = "rollouts"
    min_group: ClassVar[int] = 2
    trains: ClassVar[Literal["model", "policy"]] = "model"

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def needs_reference(self) -> bool:
        """Whether loss() reads experience.reference."""
        return False

    @property
    def replays_trajectory(self) -> bool:
        """Whether masks() reads unmask_step; then refused with strategies that revise committed tokens."""
        return False

    @property
    def needs_entropy(self) -> bool:
        """Whether loss() reads experience.entropy."""
        return False

    @property
    def value_clip(self) -> float | None:
        """Half-width of the clip of value predictions, if the learner is to train a value model for credit()."""
        return None

    def credit(self, rewards: Rewards, batch: RolloutBatch, value: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and value targets, both (N, L), from value predictions (N, L); in place of advantages()."""
        raise NotImplementedError

    @property
    def asks_further(self) -> bool:
        """Whether extra_rollouts() may ask for more rollouts; prompts then carry the tokens of their trace."""
        return False

    def check_plan(self, plan: Plan) -> None:
        """Raise ValueError, in one line, if the algorithm cannot work with this plan."""

    def extra_rollouts(
        self,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        batch: RolloutBatch,
        *,
        canvas: int,
        generator: torch.Generator,
    ) -> Sequence[ExtraRollout]:
        """More rollouts to make, in view of the ordinary ones.

        Args:
            prompts: of the groups; group g of the batch belongs to prompts[g].
            rewards: of the ordinary rollouts.
            batch: the ordinary rollouts.
            canvas: tokens of the completion canvas.
            generator: CPU generator.
        """
        return ()

    def select_rows(self, extra: Tensor, rewards: Rewards, batch: RolloutBatch, generator: torch.Generator) -> Tensor:
        """Which rows to learn from, once the further rollouts are there.

        Args:
            extra: (N,) bool; the rows that extra_rollouts() asked for, at the end.
            rewards: of all rows.
            batch: all rows.
            generator: CPU generator.
        Returns:
            int64 row numbers.
        """
        return (~extra).nonzero().flatten()

    def keep(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """(N,) bool: rows to train on. Groups dropped here cost no learner time."""
        return rewards.included

    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """(N,) or (N, L) float32 advantages; rows that are not included get 0 and do not enter any baseline."""
        raise NotImplementedError

    def masks(self, batch: RolloutBatch, generator: torch.Generator) -> MaskSample:
        """The draws that old, reference and current policy are scored with. Called once per batch."""
        raise NotImplementedError

    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """Scalar loss; differentiable in new.token_logp, and only through it.

        Sums over rows divided by experience.num_tokens or num_rows, so that it does not depend on sharding.
        """
        raise NotImplementedError
