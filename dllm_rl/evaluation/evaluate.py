"""Held-out accuracy and speed of a model, with a confidence interval."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dllm_rl.data.collate import completion_texts
from dllm_rl.errors import UserError
from dllm_rl.evaluation.intervals import wilson
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.reward_pool.score import score_completions
from dllm_rl.types import Prompt, Rewards, Sampling, Trajectory

Record = Callable[[Mapping[str, Any]], None]


class Unscored(UserError):
    """An evaluation without a single verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Figures of one decoding setting.

    Attributes:
        tokens_per_step: positions committed per forward that were asked for.
        success: share of scored examples that are solved.
        low: lower end of the 95% interval of success.
        high: upper end.
        scored: examples with a verdict.
        failed: examples whose verifier failed; not part of any figure.
        components: mean of each reward component.
        tokens_per_forward: completion tokens per denoising forward, over all examples.
        seconds: wall time.
        solved: per example, 1 or 0, or None where the verifier failed; for paired comparisons.
    """

    tokens_per_step: int
    success: float
    low: float
    high: float
    scored: int
    failed: int
    components: dict[str, float]
    tokens_per_forward: float
    seconds: float
    solved: tuple[int | None, ...]

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl."""
        prefix = f"eval/{self.tokens_per_step}_per_step"
        return {
            f"{prefix}/success": self.success,
            f"{prefix}/success_low": self.low,
            f"{prefix}/success_high": self.high,
            f"{prefix}/scored": self.scored,
            f"{prefix}/tokens_per_forward": self.tokens_per_forward,
            **{f"{prefix}/{name}": value for name, value in self.components.items()},
        }

    def summary(self) -> dict[str, Any]:
        """Everything but the per-example record."""
        return {k: v for k, v in asdict(self).items() if k != "solved"}


def evaluate(
    generate: Callable[..., list[Trajectory]],
    pool: RewardPool,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    sampling: Sampling,
    *,
    seed: int,
    chunk: int = 128,
    advance: Callable[[int, str], None] = lambda done, note: None,
    record: Record = lambda row: None,
) -> Evaluation:
    """Decode one completion per prompt and score it.

    Args:
        generate: RolloutEngine.generate, or all engines', with the weights to evaluate.
        pool: reward workers.
        prompts: held-out prompts.
        tokenizer: to decode completions.
        sampling: temperature 0 for greedy.
        seed: for sampled decoding.
        chunk: prompts per call of generate.
        advance: told how many prompts have finished.
        record: given every completion with its verdicts, in the order of the prompts.
    Raises:
        UserError: no prompts.
        Unscored: not one of them could be scored.
    """
    if not prompts:
        raise UserError("evaluation needs at least one held-out example; the task's test split is empty")
    pool.begin_step(None)  # what an evaluation takes is not held against a step
    started = time.perf_counter()
    solved: list[int | None] = []
    values: dict[str, list[float]] = {}
    tokens = forwards = 0
    for begin in range(0, len(prompts), chunk):
        part = prompts[begin : begin + chunk]
        trajectories = generate(part, sampling, seed=seed)
        texts = completion_texts(trajectories, tokenizer)
        rewards = score_completions(
            pool, part, texts, [t.completion_length for t in trajectories], trajectories=trajectories
        )
        tokens += sum(t.completion_length for t in trajectories)
        forwards += sum(t.num_forwards for t in trajectories)
        said = completion_texts(trajectories, tokenizer, special=True)
        for row, included in enumerate(rewards.included.tolist()):
            record(_verdict(sampling, part[row], said[row], trajectories[row], rewards, row))
            solved.append(int(rewards.solved[row]) if included else None)
            for name, value in rewards.components.items():
                if included and not value[row].isnan():
                    values.setdefault(name, []).append(value[row].item())
        advance(len(part), "")
    scored = [s for s in solved if s is not None]
    if not scored:
        raise Unscored(f"no completion could be scored; last failure: {pool.failures[-1] if pool.failures else '?'}")
    low, high = wilson(sum(scored), len(scored))
    return Evaluation(
        tokens_per_step=sampling.tokens_per_step,
        success=sum(scored) / len(scored),
        low=low,
        high=high,
        scored=len(scored),
        failed=len(solved) - len(scored),
        components={name: sum(v) / len(v) for name, v in values.items()},
        tokens_per_forward=tokens / max(forwards, 1),  # every canvas fully injected: no forward at all
        seconds=time.perf_counter() - started,
        solved=tuple(solved),
    )


def _verdict(
    sampling: Sampling, prompt: Prompt, said: str, trajectory: Trajectory, rewards: Rewards, row: int
) -> dict[str, Any]:
    """A completion as it was generated, special tokens included, and what each reward says of it (None: nothing)."""
    values = {name: value[row].item() for name, value in rewards.components.items()}
    return {
        "tokens_per_step": sampling.tokens_per_step,
        "uid": prompt.uid,
        "prompt": prompt.text,
        "completion": said,
        "answer": prompt.answer,
        "solved": bool(rewards.solved[row]) if bool(rewards.included[row]) else None,
        "status": rewards.status[row],
        "rewards": {name: None if value != value else value for name, value in values.items()},
        "completion_tokens": trajectory.completion_length,
        "num_forwards": trajectory.num_forwards,
    }
