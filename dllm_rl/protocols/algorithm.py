"""The contract of training methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dllm_rl.types import (
    Example,
    Experience,
    LikelihoodEstimate,
    Loss,
    MaskSample,
    Metric,
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
        teacher: whether the reference is another network (model.teacher), not the start of the run.
    """

    sampling: Sampling
    strategy: str
    has_policy: bool
    examples: Sequence[Example]
    task: str
    teacher: bool = False


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an algorithm asks of the parts around it.

    Attributes:
        source: "rollouts" trains on fresh samples, "demonstrations" on reference completions, "pairs" on preferences:
            rows 2j and 2j + 1 are then the chosen and the rejected completion of pair j, with rewards 1 and 0.
        trains: the model, the unmasking strategy's policy, or both. What is not trained is frozen; estimates have
            choice_logp if the policy is trained, and no token is scored if the model is not.
        group_size: fewest samples per prompt from which its advantages can learn; 1 if they need no group.
        reference: loss() reads experience.reference.
        old: loss() reads experience.old; else the policy is not scored before the first of several updates.
        entropy: loss() reads experience.entropy.
        trajectory: masks() or loss() reads unmask_step; then refused with strategies that revise committed tokens.
        behaviour_logp: it reads batch.behaviour_logp as the learner's own; then refused with engines whose
            log-probabilities are approximate, unless rollout.correction replaces them.
        fresh_masks: every optimiser update of a step has draws of its own; else all of them share one.
        draws: loss() reads the log-probabilities of each draw (draw_token_logp).
        traces: prompts carry the tokens of their trace.
        values: it is a ValueBaseline, and advantages come from credit().
        row_credit: loss() takes one advantage per row, whose likelihood is one number; rollout.correction then has to
            be sequence.
    """

    source: Literal["rollouts", "demonstrations", "pairs"] = "rollouts"
    trains: frozenset[Literal["model", "policy"]] = frozenset({"model"})
    group_size: int = 2
    reference: bool = False
    old: bool = True
    entropy: bool = False
    trajectory: bool = False
    behaviour_logp: bool = False
    fresh_masks: bool = False
    draws: bool = False
    traces: bool = False
    values: bool = False
    row_credit: bool = False


class Algorithm:
    """A training method: which noised copies are scored, how rewards become advantages, and the loss.

    Attributes:
        metrics: what its losses log beside the metrics of dllm_rl/reports/metrics.py: name, or a pattern such as
            "mine/*", -> unit and meaning. A run that meets an undeclared one is refused.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options of the algorithm."""

    metrics: ClassVar[Mapping[str, Metric]] = {}

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        """What it asks for; a function of the configuration alone."""
        return Needs()

    def check_plan(self, plan: Plan) -> None:
        """Raise UserError, in one line, if the algorithm cannot work with this plan."""

    def keep(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """(N,) bool: rows to train on. Groups dropped here cost no learner time."""
        return rewards.included

    def advantages(self, rewards: Rewards, batch: RolloutBatch) -> Tensor:
        """Advantages, float32; rows that are not included get 0 and do not enter any baseline.

        Returns:
            (N,) per row, (N, L) per token, or (K, N, L) per token of each of the K draws that masks() makes.
        """
        raise NotImplementedError

    def masks(self, batch: RolloutBatch, generator: torch.Generator, update: int = 0) -> MaskSample:
        """The draws that old, reference and current policy are scored with.

        Args:
            batch: rows of the step.
            generator: CPU generator.
            update: number of the optimiser update within the step; 0 unless needs.fresh_masks.
        """
        raise NotImplementedError

    def loss(self, new: LikelihoodEstimate, experience: Experience) -> Loss:
        """Scalar loss; differentiable in new.differentiable, and only through it.

        Sums over rows divided by the num_tokens, num_rows or num_choices of experience.counts, so that it does not
        depend on sharding.
        """
        raise NotImplementedError


@runtime_checkable
class ExtraRollouts(Protocol):
    """An algorithm that asks for more rollouts in view of the ordinary ones: hints, experts."""

    def extra_rollouts(
        self,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        batch: RolloutBatch,
        *,
        canvas: int,
        generator: torch.Generator,
    ) -> Sequence[ExtraRollout]:
        """More rollouts to make.

        Args:
            prompts: of the groups; group g of the batch belongs to prompts[g].
            rewards: of the ordinary rollouts.
            batch: the ordinary rollouts.
            canvas: tokens of the completion canvas.
            generator: CPU generator.
        """

    def select_rows(self, extra: Tensor, rewards: Rewards, batch: RolloutBatch, generator: torch.Generator) -> Tensor:
        """Which rows to learn from, once the extra rollouts are there; int64 row numbers.

        Args:
            extra: (N,) bool; the rows that extra_rollouts() asked for, at the end.
            rewards: of all rows.
            batch: all rows.
            generator: CPU generator.
        """


@runtime_checkable
class ValueBaseline(Protocol):
    """An algorithm whose advantages come from a value model, if needs.values says so.

    Attributes:
        value_clip: half-width of the clip of value predictions, in units of the reward.
    """

    @property
    def value_clip(self) -> float:
        """A plain attribute will do."""

    def credit(self, rewards: Rewards, batch: RolloutBatch, value: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and value targets, both (N, L), from value predictions (N, L); in place of advantages()."""


@runtime_checkable
class ReferenceMasks(Protocol):
    """An algorithm whose reference is shown more, or less, than the model: privileged self-distillation."""

    def reference_masks(self, batch: RolloutBatch, masks: MaskSample, generator: torch.Generator) -> MaskSample:
        """The draws that the reference is scored with.

        Args:
            batch: rows of the step.
            masks: those of the model, for one optimiser update.
            generator: CPU generator.
        Returns:
            A weight may be other than 0 only where its draw masks the token.
        """


@runtime_checkable
class JointMasks(Protocol):
    """An algorithm that draws the masks of a step's optimiser updates together: masking rates on one grid."""

    def joint_masks(self, batch: RolloutBatch, generator: torch.Generator, updates: int) -> Sequence[MaskSample]:
        """The draws of each optimiser update of a step, in their order; in place of masks() while training.

        Args:
            batch: rows of the step.
            generator: CPU generator, one for all updates.
            updates: number of optimiser updates of the step; 1 unless needs.fresh_masks.
        """
