"""The contracts between the parts. Docstrings are binding.

Every plugin class has a nested frozen dataclass ``Config`` (its options, all with defaults unless there is no sensible
one) and takes one instance of it: ``Plugin(config)``. A Config raises ValueError in ``__post_init__`` for values out
of range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dllm_rl.plans import Further, Plan
from dllm_rl.types import (
    BlockOrigin,
    Example,
    Experience,
    LikelihoodEstimate,
    Loss,
    MaskSample,
    Prompt,
    Rewards,
    RolloutBatch,
    Sampling,
    Share,
    Trajectory,
    WeightsVersion,
)


class Cache(Protocol):
    """Keys and values of committed tokens, one entry per row. Opaque to engines."""

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows (int64 indices), in this order."""


@runtime_checkable
class Denoiser(Protocol):
    """A network that predicts hidden tokens.

    Output position i always predicts token i (families that predict the next position are shifted inside).

    Attributes:
        mask_id: id of the absorbing mask token; never a sampled token.
        eos_id: id that ends a completion.
        pad_id: id for padding.
        vocab_size: number of logits.
        max_length: longest sequence, tokens.
        block_size: None for full attention, else tokens per block of a block-causal family.
        block_origin: where blocks start for a block-causal family: "response" or "sequence".
        shift: True if the network itself predicts position i at i - 1 (then position 0 can never be hidden).
        device: where tensors must live.
        module: the torch module whose parameters are trained.
    """

    mask_id: int
    eos_id: int
    pad_id: int
    vocab_size: int
    max_length: int
    block_size: int | None
    block_origin: BlockOrigin
    shift: bool
    module: nn.Module

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""

    def hidden(self, tokens: Tensor, mask: Tensor, valid: Tensor, blocks: Tensor | None = None) -> Tensor:
        """Final hidden states whose unembedding predicts each position.

        Args:
            tokens: (N, L) int64, rows padded on the right.
            mask: (N, L) bool, True where the token is hidden (replaced by the mask token).
            valid: (N, L) bool, False on padding; padding is never attended to.
            blocks: (N, L) int64 block number of each position (see diffusion.layout), required by block-causal
                families and None for full attention. The forward is then over [clean | noised]: a noised position of
                block b sees clean blocks < b and noised block b; a clean position of block b sees clean blocks <= b.
        Returns:
            (N, L, D) in the dtype of the network; values on padding are meaningless.
        """

    def unembed(self, rows: Tensor) -> Tensor:
        """Logits (M, V) of hidden states (M, D), in the dtype of the network."""

    def prefill(self, tokens: Tensor, valid: Tensor, blocks: Tensor) -> Cache:
        """Keys and values of clean (N, P) right-padded prompts under block-causal attention. Block families only."""

    def extend(self, cache: Cache, tokens: Tensor, positions: Tensor, valid: Tensor, *, commit: bool) -> Tensor:
        """Hidden states (N, W, D) of one window per row that sees the cache and the whole window. Block families only.

        Args:
            cache: what the rows have committed so far; every valid entry is visible to every window position.
            tokens: (N, W) int64 with the mask token at hidden positions.
            positions: (N, W) int64 absolute positions.
            valid: (N, W) bool; invalid window positions are not attended to.
            commit: append the window's keys and values to the cache (clean tokens) or leave the cache as it was.
        """


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
        """Whether further() may ask for more rollouts; prompts then carry the tokens of their trace."""
        return False

    def check_plan(self, plan: Plan) -> None:
        """Raise ValueError, in one line, if the algorithm cannot work with this plan."""

    def further(
        self,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        batch: RolloutBatch,
        *,
        canvas: int,
        generator: torch.Generator,
    ) -> Sequence[Further]:
        """More rollouts to make, in view of the ordinary ones.

        Args:
            prompts: of the groups; group g of the batch belongs to prompts[g].
            rewards: of the ordinary rollouts.
            batch: the ordinary rollouts.
            canvas: tokens of the completion canvas.
            generator: CPU generator.
        """
        return ()

    def mix(self, further: Tensor, rewards: Rewards, batch: RolloutBatch, generator: torch.Generator) -> Tensor:
        """Which rows to learn from, once the further rollouts are there.

        Args:
            further: (N,) bool; the rows that further() asked for, at the end.
            rewards: of all rows.
            batch: all rows.
            generator: CPU generator.
        Returns:
            int64 row numbers.
        """
        return (~further).nonzero().flatten()

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


class RolloutEngine(Protocol):
    """Generates trajectories with some weights.

    Attributes:
        weights: version of the weights that it holds.
    """

    @property
    def weights(self) -> WeightsVersion:
        """A plain attribute will do; it is set when new weights have arrived."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        samples_per_prompt: int = 1,
        begun: Sequence[Trajectory] | None = None,
        blocks: int | None = None,
    ) -> list[Trajectory]:
        """Decode every prompt samples_per_prompt times, prompt-major order.

        A trajectory is a function of (weights, prompt, sample index, sampling, seed) only: not of the batch it is in,
        nor of where it was paused while the weights were the same.

        Args:
            prompts: what to complete.
            sampling: how to decode.
            seed: of all randomness.
            samples_per_prompt: rows of each prompt.
            begun: what an earlier call with the same arguments returned, to go on with where it was paused: blocks
                that are finished stay, whatever the weights now say.
            blocks: pause rows once this many decoding blocks of their canvas are finished; None = decode everything.
        """


class Reward(Protocol):
    """A verifier; a plain function with this signature works too (compatible with TRL's reward functions).

    Returns one value per completion; None = not applicable; a rewards.Verdict carries a status besides its value.
    Raising, or running past the deadline, marks the row as failed: it is excluded from its group, never scored 0.
    """

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> Sequence[float | None]:
        """Score completions; columns hold one list per dataset column, aligned with completions."""


class Task:
    """A source of examples with a verifier: training and held-out rows, and what the reward canary checks."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options of the task."""

    rewards: ClassVar[tuple[str, ...]] = ()  # default reward names when the config lists none
    success: ClassVar[str] = ""  # the reward component whose value >= 1 counts as solved in evaluation
    characters: ClassVar[str] = ""  # what a character tokenizer must know even if no training text has it

    def __init__(self, config: Any) -> None:
        self.config = config

    def examples(self, split: Literal["train", "test"]) -> Sequence[Example]:
        """The rows of a split, always in the same order. Raises ValueError naming file and line of a malformed row."""
        raise NotImplementedError

    def canary(self, example: Example) -> tuple[str, str]:
        """(gold, wrong): a completion that must score full marks, and one that must not, in the deployed rewards."""
        raise NotImplementedError


class Learner(Protocol):
    """Owns the trained weights."""

    step: int

    def score(self, batch: RolloutBatch, masks: MaskSample, *, reference: bool = False) -> LikelihoodEstimate:
        """Likelihoods without gradient under the current weights, or the frozen reference."""

    def update(
        self,
        batch: RolloutBatch,
        rewards: Rewards,
        advantage: Tensor,
        masks: MaskSample,
        algorithm: Algorithm,
        *,
        reference: LikelihoodEstimate | None,
        share: Share | None = None,
    ) -> Mapping[str, float]:
        """Train on one batch; the old policy is the one that enters. Returns metrics.

        A rank that holds some rows of a larger batch is told its share of it; None = the batch is whole.

        A non-finite loss or gradient raises before the weights change, and dumps the batch.
        """

    def reference_digest(self) -> str:
        """Digest of the frozen reference's weights."""

    def drop_reference(self) -> None:
        """Free the frozen reference; it is not scored with any more."""

    def skip(self) -> Mapping[str, float]:
        """Count a step without an update: the algorithm kept no row. Returns no metrics."""

    def version(self) -> WeightsVersion:
        """The current step and a digest of the trainable weights."""

    def save(self, folder: Path) -> None:
        """Write model weights (family layout, or adapter) and optimiser state into a folder."""

    def load(self, folder: Path) -> None:
        """Restore what save wrote, bit for bit."""
