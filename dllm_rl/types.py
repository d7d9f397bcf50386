"""The values that travel between the parts of dllm-rl.

Axis letters, fixed across the repository: N rows, L padded length, K draws, V vocabulary, D hidden width, W window.
Rows are padded on the right: a row is its prompt, its completion canvas, then padding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dllm_rl.errors import UserError
from dllm_rl.literals import BlockOrigin as BlockOrigin
from dllm_rl.literals import Confidence, Finish, Schedule

_EACH_ROW = torch.empty(0, dtype=torch.int64)  # default of RolloutBatch.episode and turn
GIVEN = -1  # unmask_step of a position that was given (prompt, injected token, padding), not generated


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row of a task before tokenisation.

    Attributes:
        uid: stable identity of the row; randomness is keyed by it.
        prompt: plain text, or chat messages ``[{"role": ..., "content": ...}]``.
        answer: the reference answer that the task's verifier compares with.
        task: name of the task.
        completion: reference completion for supervised training (text), or None.
        chosen: preferred completion (preference data), or None.
        rejected: dispreferred completion (preference data), or None.
        trace: reference reasoning that leads to the answer, without the answer itself, or None; hints are cut from it.
        columns: further columns handed to reward functions as keyword arguments.
    """

    uid: str
    prompt: str | list[dict[str, str]]
    answer: str
    task: str
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    trace: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A tokenised prompt.

    Attributes:
        uid: stable identity; sampling randomness is keyed by it, never by batch position.
        token_ids: the prompt's tokens, at least one.
        text: the prompt as rendered by the chat template.
        answer: reference answer.
        task: name of the task.
        columns: further columns for reward functions.
        injected: completion offset -> token that is given, not generated (never masked, never re-masked).
        trace: tokens of the reference reasoning, for algorithms that give hints; else empty.
    """

    uid: str
    token_ids: tuple[int, ...]
    text: str
    answer: str
    task: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    injected: Mapping[int, int] = field(default_factory=dict)
    trace: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsVersion:
    """Which weights: the optimiser step and a digest computed by whoever holds them."""

    step: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are decoded.

    Attributes:
        max_new_tokens: length of the completion canvas, tokens.
        block_size: decoding block, tokens; None = the whole canvas is one block (block-causal families: their own).
        tokens_per_step: positions committed per forward by count-based strategies; with steps, what they come to.
        steps: denoising steps of the whole canvas, spread evenly over its blocks; None = from tokens_per_step.
        schedule: how many positions each step commits; see diffusion.schedule.commits.
        temperature: 0 = greedy; otherwise token logits are divided by it before sampling.
        top_k: keep only the k most likely tokens, or None.
        top_p: keep the smallest set of tokens whose probability reaches p, or None.
        top_p_first: whether top_p is applied before top_k.
        confidence: whose probabilities strategies rank positions by: of the "model" (temperature 1, unfiltered), or
            "sampled", those that tokens are drawn from.
        cfg_scale: scale s of classifier-free guidance, u + (s + 1) (l - u) with the logits l and those u of the canvas
            behind a masked prompt; 0 = none. Doubles the forwards; full attention without shift only.
        suppress_tokens: token ids that are never proposed.
        defer_tokens: token ids whose positions are committed last.
    """

    max_new_tokens: int
    block_size: int | None = None
    tokens_per_step: int = 1
    steps: int | None = None
    schedule: Schedule = "static"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    top_p_first: bool = False
    confidence: Confidence = "model"
    cfg_scale: float = 0.0
    suppress_tokens: tuple[int, ...] = ()
    defer_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check ranges; every message says what is allowed."""
        for name, fits, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("tokens_per_step", self.tokens_per_step >= 1, "at least 1"),
            ("steps", self.steps is None or self.steps >= 1, "at least 1, or null for tokens_per_step"),
            ("temperature", self.temperature >= 0, ">= 0 (0 means greedy)"),
            ("cfg_scale", self.cfg_scale >= 0, ">= 0 (0 means no guidance)"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or null to keep every token"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or null to keep every token"),
            ("block_size", self.block_size is None or self.block_size >= 1, "at least 1, or null for one block"),
        ):
            if not fits:
                raise UserError(f"sampling.{name} = {getattr(self, name)}: must be {allowed}")
        size, canvas = self.block_size or 1, self.max_new_tokens
        if canvas % size:
            raise UserError(
                f"sampling.max_new_tokens = {canvas} is not a multiple of sampling.block_size = {size}; "
                f"{-(-canvas // size) * size} is"
            )
        if self.defer_tokens and self.confidence == "sampled":
            raise UserError(
                "sampling.defer_tokens ranks positions without these tokens, which a filtered distribution may hold "
                "alone; set sampling.confidence to model"
            )
        if self.steps is not None:
            object.__setattr__(self, "tokens_per_step", -(-canvas // self.steps))
            if self.block_size is not None:
                self.steps_per_block(self.block_size)

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the model's own distribution: untempered, unfiltered, unguided."""
        filters = self.top_k is not None or self.top_p not in (None, 1) or bool(self.suppress_tokens)
        return self.temperature == 1 and not filters and not self.cfg_scale

    def steps_per_block(self, block_size: int) -> int:
        """Denoising steps of a block of so many tokens.

        Raises:
            UserError: the steps of the canvas do not divide over its blocks.
        """
        if self.steps is None:
            return -(-block_size // self.tokens_per_step)
        steps, rest = divmod(self.steps * block_size, self.max_new_tokens)
        if rest or not steps:
            raise UserError(
                f"sampling.steps = {self.steps} do not divide over {self.max_new_tokens} tokens in blocks of "
                f"{block_size}; set a multiple of {self.max_new_tokens // math.gcd(self.max_new_tokens, block_size)}"
            )
        return steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One decoded completion and how it was decoded.

    Attributes:
        prompt_uid: uid of the prompt.
        sample: index within the prompt's group.
        tokens: (L,) int64; prompt, then the whole completion canvas. Canvas positions that were never decoded
            (blocks after the one that held the first end token) hold the EOS token.
        prompt_length: number of prompt tokens.
        completion_length: tokens up to and including the first end token, or the whole canvas.
        events: (E, 3) int64 rows (forward index, position, token), in commit order.
        unmask_step: (L,) int64; the forward (0-based) that committed the position, GIVEN if it was given,
            num_forwards if it was never decoded.
        behaviour_logp: (L,) float32 nats; log p(token | state before its commit) under the untempered model
            distribution without the mask token; 0 where not generated.
        num_forwards: denoising forwards that the row took part in.
        finish: "eos" if an end token ended the row, "length" if the canvas is full, "paused" if blocks are left.
        exact: whether behaviour_logp are those of the learner's own network (no approximate cache).
        weights: the weights that generated it, or its last blocks.
        weights_step: (L,) int64; optimiser step of the weights that committed the position, several per row if it was
            paused; GIVEN where it was given or never decoded.
        order: (L,) int64; place in the order in which its forward's positions were chosen, from 1; 0 where not decoded.
            None if the engine does not tell.
        sampled_logp: (L,) float32 nats; of the token under the distribution that it was drawn from (temperature, top_k,
            top_p, suppress_tokens). None if that is the model's own, or if the engine does not tell.
        confidence: (T, L) float32 for T forwards; probability (Sampling.confidence) of the token proposed at each
            position that the forward computed and that was masked, 0 elsewhere. Kept for learned strategies, else None.
    """

    prompt_uid: str
    sample: int
    tokens: Tensor
    prompt_length: int
    completion_length: int
    events: Tensor
    unmask_step: Tensor
    behaviour_logp: Tensor
    num_forwards: int
    finish: Finish
    exact: bool
    weights: WeightsVersion
    weights_step: Tensor
    order: Tensor | None = None
    sampled_logp: Tensor | None = None
    confidence: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """N rows, padded on the right to length L.

    Attributes:
        tokens: (N, L) int64.
        valid: (N, L) bool; False on padding.
        completion: (N, L) bool; the scored tokens: the canvas up to and including the first end token.
        hint: (N, L) bool; completion tokens that were given (Prompt.injected), not generated.
        tail: (N, L) bool; canvas positions after the first end token: masked from random-mask estimators, never scored.
        unmask_step: (N, L) int64; see Trajectory; GIVEN on padding.
        behaviour_logp: (N, L) float32 nats.
        prompt_length: (N,) int64.
        group: (N,) int64; rows of one prompt share a number.
        episode: (N,) int64; rows that are turns of one sample share a number, within a group. Default: none do.
        turn: (N,) int64; number of the turn within its episode, from 0; earlier turns are part of its prompt.
        num_forwards: (N,) int64.
        weights_step: (N, L) int64; optimiser step of the weights that committed the token, GIVEN where none did.
        block_ids: (N, L) int64 block numbers (diffusion.layout.block_index) for block-causal models, else None.
        exact: every row's behaviour_logp are the learner's own.
        order: (N, L) int64 or None; see Trajectory.
        sampled_logp: (N, L) float32 nats or None; see Trajectory.
        confidence: (N, T, L) float32, padded with 0 over forwards, or None; see Trajectory.
        expert: (N,) bool; decoded by an expert's unmasking strategy, not the one that is trained; None = no row.
    """

    tokens: Tensor
    valid: Tensor
    completion: Tensor
    hint: Tensor
    tail: Tensor
    unmask_step: Tensor
    behaviour_logp: Tensor
    prompt_length: Tensor
    group: Tensor
    num_forwards: Tensor
    weights_step: Tensor
    block_ids: Tensor | None
    exact: bool
    order: Tensor | None = None
    sampled_logp: Tensor | None = None
    confidence: Tensor | None = None
    expert: Tensor | None = None
    episode: Tensor = _EACH_ROW
    turn: Tensor = _EACH_ROW

    def __post_init__(self) -> None:
        """Without episodes every row is one of its own."""
        if len(self.episode) < len(self):
            object.__setattr__(self, "episode", torch.arange(len(self), device=self.tokens.device))
        if len(self.turn) < len(self):
            object.__setattr__(self, "turn", torch.zeros_like(self.episode))

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def generated(self) -> Tensor:
        """(N, L) bool: the completion without its hints."""
        return self.completion & ~self.hint

    @property
    def tokens_per_forward(self) -> Tensor:
        """(N,) float32: generated completion tokens per denoising forward (TPF)."""
        return self.generated.sum(-1) / self.num_forwards.clamp(min=1)

    def check(self) -> RolloutBatch:
        """Return self after checking shapes and the relations between the fields.

        Raises:
            UserError: naming the field that is off.
        """
        n, length = self.tokens.shape
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, Tensor):
                continue
            want = (n, *value.shape[1:-1], length) if value.dim() > 1 else (n,)
            if tuple(value.shape) != want:
                raise ValueError(f"RolloutBatch.{f.name} has shape {tuple(value.shape)}, expected {want}")
        if bool((self.completion & ~self.valid).any()):
            raise ValueError("RolloutBatch.completion marks padding")
        if bool((self.hint & ~self.completion).any()):
            raise ValueError("RolloutBatch.hint marks more than the completion")
        if bool((self.completion & self.tail).any()):
            raise ValueError("RolloutBatch.tail overlaps completion")
        if not bool(self.completion.any(-1).all()):
            row = int((~self.completion.any(-1)).nonzero()[0])
            raise ValueError(f"RolloutBatch row {row} has no completion token")
        return self

    def select(self, rows: Tensor) -> RolloutBatch:
        """The batch restricted to rows (int64 indices or a bool mask over N)."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        chosen: dict[str, Any] = {name: v[rows] for name, v in values.items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **chosen)


RewardStatus = Literal["ok", "invalid", "timeout", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """Rewards of N rows.

    Attributes:
        components: name -> (N,) float32; NaN where the verifier failed or did not apply.
        total: (N,) float32 weighted sum of the components, or of their z-scores; 0 where excluded (never read there).
        included: (N,) bool; False where any verifier failed (timeout, error): out of the group, never scored 0.
        solved: (N,) bool; the task's success component reached 1.
        status: per row, the worst status over components.
        decoupled: total is the sum of the z-scores, so that it is normalised already (diffusion.advantage.decoupled).
    """

    components: Mapping[str, Tensor]
    total: Tensor
    included: Tensor
    solved: Tensor
    status: tuple[RewardStatus, ...]
    decoupled: bool = False

    @staticmethod
    def join(first: Rewards, second: Rewards) -> Rewards:
        """The rewards of first's rows, then of second's, by the same reward functions."""
        return Rewards(
            components={name: torch.cat([value, second.components[name]]) for name, value in first.components.items()},
            total=torch.cat([first.total, second.total]),
            included=torch.cat([first.included, second.included]),
            solved=torch.cat([first.solved, second.solved]),
            status=first.status + second.status,
        )

    def select(self, rows: Tensor) -> Rewards:
        """The rewards restricted to rows (int64 indices or a bool mask over N)."""
        index = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        return dataclasses.replace(
            self,
            components={name: value[rows] for name, value in self.components.items()},
            total=self.total[rows],
            included=self.included[rows],
            solved=self.solved[rows],
            status=tuple(self.status[i] for i in index.tolist()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSample:
    """Which noised copies are scored and how the answers are weighted: the estimator's randomness, materialised.

        l_i(theta) = sum_k weight[k, i] * log p_theta(token_i | tokens with mask[k] masked)

    Attributes:
        mask: (K, N, L) bool; True where the token is masked in draw k.
        weight: (K, N, L) float32; non-zero only where masked; sums to 1 over K in expectation on the completion.
    """

    mask: Tensor
    weight: Tensor

    def also_masking(self, also: Tensor) -> MaskSample:
        """The same draws with further positions (N, L) masked in every one of them (never scored)."""
        return MaskSample(mask=self.mask | also, weight=self.weight)

    def select(self, rows: Tensor) -> MaskSample:
        """The draws restricted to rows (int64 indices or a bool mask over N)."""
        return MaskSample(mask=self.mask[:, rows], weight=self.weight[:, rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodEstimate:
    """An estimate of completion log-likelihoods.

    Attributes:
        token_logp: (N, L) float32 nats; sum_k weight[k] * log p; 0 where nothing is scored.
        draw_token_logp: (K, N, L) float32 nats; log p without its weight where weight[k, n, i] != 0, else 0. None if
            the algorithm needs no draws.
        choice_logp: (N, T) float32 nats; log-probability of the choice that an unmasking policy made at each of T
            forwards, 0 after the row's last. None if no policy is trained.
    """

    token_logp: Tensor
    draw_token_logp: Tensor | None = None
    choice_logp: Tensor | None = None

    @staticmethod
    def blank(batch: RolloutBatch) -> LikelihoodEstimate:
        """The estimate of a batch of which nothing is scored."""
        return LikelihoodEstimate(token_logp=torch.zeros(batch.tokens.shape))

    @staticmethod
    def join(parts: Sequence[LikelihoodEstimate]) -> LikelihoodEstimate:
        """The rows of all parts, which have the same draws and lengths."""
        first = parts[0]
        return first._changed(lambda name, axis, value: torch.cat([getattr(part, name) for part in parts], axis))

    def select(self, rows: Tensor) -> LikelihoodEstimate:
        """The estimate restricted to rows (int64 indices or a bool mask over N)."""
        return self._changed(lambda name, axis, value: value[rows] if axis == 0 else value[:, rows])

    def cpu(self) -> LikelihoodEstimate:
        """The estimate in main memory."""
        return self._changed(lambda name, axis, value: value.cpu())

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """What there is of token_logp, draw_token_logp and choice_logp, by name: a loss depends on nothing else."""
        names = ("token_logp", "draw_token_logp", "choice_logp")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _changed(self, change: Callable[[str, int, Tensor], Tensor]) -> LikelihoodEstimate:
        """Every tensor changed, given its name and the axis of its rows."""
        there = self.differentiable.items()
        return LikelihoodEstimate(**{n: change(n, int(n == "draw_token_logp"), value) for n, value in there})

    @property
    def sequence_logp(self) -> Tensor:
        """(N,) nats: the sum over tokens."""
        return self.token_logp.sum(-1)


def rows_of(advantage: Tensor, rows: Tensor) -> Tensor:
    """Advantages (N,), (N, L) or (K, N, L) restricted to rows (int64 indices or a bool mask over N)."""
    return advantage[rows] if advantage.dim() == 1 else advantage[..., rows, :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """Everything a loss may look at, apart from the current policy's likelihood.

    Attributes:
        batch: the rows.
        rewards: their rewards.
        advantage: (N,), (N, L) or (K, N, L) float32.
        masks: the draws shared by old, reference and current policy.
        old: likelihood under the policy at the start of the update.
        reference: likelihood under the reference, or None if the algorithm needs none.
        entropy: (N, L) float32 nats; the old policy's predictive entropy at scored positions, averaged over the draws
            that score them, or None if the algorithm needs none.
        counts: of the whole global batch (all ranks); losses divide by them, never by a local count.
    """

    batch: RolloutBatch
    rewards: Rewards
    advantage: Tensor
    masks: MaskSample
    old: LikelihoodEstimate
    reference: LikelihoodEstimate | None
    counts: GlobalCounts
    entropy: Tensor | None = None

    def select(self, rows: Tensor, counts: GlobalCounts) -> Experience:
        """Restricted to rows (int64 indices or a bool mask over N) of a minibatch, or of a rank, with its counts."""
        return Experience(
            batch=self.batch.select(rows),
            rewards=self.rewards.select(rows),
            advantage=rows_of(self.advantage, rows),
            masks=self.masks.select(rows),
            old=self.old.select(rows),
            reference=None if self.reference is None else self.reference.select(rows),
            counts=counts,
            entropy=None if self.entropy is None else self.entropy[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalCounts:
    """What a learner rank must know about the whole batch of which it holds some rows.

    Attributes:
        num_tokens: scored tokens of the whole batch.
        num_rows: rows of the whole batch. A row is a turn: in a loss, an episode weighs as many rows as it has turns;
            only within the baselines of advantages does it count once.
        num_choices: forwards of the whole batch, each of them one choice of the unmasking strategy.
        idle: the rank has no rows of its own; the one it is given only lets it keep step with the others.
    """

    num_tokens: int
    num_rows: int
    num_choices: int
    idle: bool = False

    @staticmethod
    def of(batch: RolloutBatch) -> GlobalCounts:
        """The counts of a whole batch."""
        tokens, choices = int(batch.completion.sum()), int(batch.num_forwards.sum())
        return GlobalCounts(num_tokens=tokens, num_rows=len(batch), num_choices=choices)


@dataclass(frozen=True, slots=True)
class Minibatch:
    """Rows (int64 indices) that one optimiser update learns from, and the counts of all ranks' rows of it."""

    rows: Tensor
    counts: GlobalCounts


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's unit ("" for none) and its meaning, in one line."""

    unit: str
    meaning: str


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """What a learner trains on in one step.

    Attributes:
        batch: the rows.
        rewards: their rewards.
        advantage: (N,), (N, L) or (K, N, L) float32.
        masks: draws of each optimiser update; a single entry is shared by all of them.
        reference: likelihood under the reference for each entry of masks, or None if the algorithm needs none.
        minibatches: what each optimiser update of a pass over the batch learns from; None = the batch is whole, and the
            learner splits it.
    """

    batch: RolloutBatch
    rewards: Rewards
    advantage: Tensor
    masks: Sequence[MaskSample]
    reference: Sequence[LikelihoodEstimate] | None = None
    minibatches: Sequence[Minibatch] | None = None

    def select(self, rows: Tensor, minibatches: Sequence[Minibatch]) -> TrainingBatch:
        """What the rank that holds these rows (int64 indices or a bool mask over N) of it trains on."""
        return TrainingBatch(
            self.batch.select(rows),
            self.rewards.select(rows),
            rows_of(self.advantage, rows),
            [drawn.select(rows) for drawn in self.masks],
            None if self.reference is None else [one.select(rows) for one in self.reference],
            minibatches,
        )


@dataclass(frozen=True, slots=True)
class Loss:
    """A scalar to minimise and detached scalars to log."""

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
