"""Collects what a step learns from: fresh judged rollouts, or demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from dllm_rl import seeding
from dllm_rl.assembly import Parts
from dllm_rl.config.schema import Config
from dllm_rl.data.collate import collate, completion_texts, supervised
from dllm_rl.reports.measure import rollout_metrics
from dllm_rl.runtime.judge import judge
from dllm_rl.types import Prompt, Rewards, RewardStatus, RolloutBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A batch with its rewards, its metrics, and rows for samples.jsonl."""

    batch: RolloutBatch
    rewards: Rewards
    metrics: dict[str, float]
    samples: Sequence[dict[str, Any]]


def roll_out(
    parts: Parts,
    config: Config,
    prompts: Sequence[Prompt],
    step: int,
    timer: Callable[[str], AbstractContextManager[None]],
) -> Collected:
    """Decode samples_per_prompt completions per prompt and judge them.

    Raises:
        RuntimeError: more than reward_pool.max_failure_fraction of the rows could not be judged.
    """
    assert parts.pool is not None, "assemble() refuses rollouts without rewards"
    size = config.data.samples_per_prompt
    with timer("rollout_s"):
        seed = seeding.derive(config.run.seed, "rollout", step)
        trajectories = parts.engine.generate(prompts, parts.sampling, seed=seed, samples_per_prompt=size)
    group = [row // size for row in range(len(trajectories))]
    denoiser = parts.learner.denoiser
    batch = collate(
        trajectories,
        pad_id=denoiser.pad_id,
        group=group,
        block_size=denoiser.block_size,
        block_origin=denoiser.block_origin,
    )
    repeated = [prompts[g] for g in group]
    texts = completion_texts(trajectories, parts.tokenizer)
    with timer("reward_s"):
        rewards = judge(parts.pool, repeated, texts, [t.completion_length for t in trajectories])
    failed = 1 - rewards.included.float().mean().item()
    if failed > config.reward_pool.max_failure_fraction:
        raise RuntimeError(
            f"step {step}: {failed:.0%} of the completions could not be judged (reward_pool.max_failure_fraction = "
            f"{config.reward_pool.max_failure_fraction}); last failure: {parts.pool.failures[-1]}"
        )
    samples = [
        {
            "uid": prompt.uid,
            "prompt": prompt.text,
            "completion": text,
            "answer": prompt.answer,
            "reward": rewards.total[row].item(),
            "status": rewards.status[row],
            "num_forwards": trajectories[row].num_forwards,
        }
        for row, (prompt, text) in enumerate(zip(repeated, texts, strict=True))
    ]
    metrics = rollout_metrics(batch, rewards)
    return Collected(batch=batch, rewards=rewards, metrics=metrics, samples=samples)


def demonstrate(parts: Parts, prompts: Sequence[Prompt]) -> Collected:
    """The reference completions of the prompts with reward 1; of pairs, the chosen one with 1, the rejected with 0."""
    denoiser = parts.learner.denoiser
    completions = [parts.demonstrations[prompt.uid] for prompt in prompts]
    batch = supervised(
        [prompt for prompt, texts in zip(prompts, completions, strict=True) for _ in texts],
        [text for texts in completions for text in texts],
        group=[number for number, texts in enumerate(completions) for _ in texts],
        eos_id=denoiser.eos_id,
        pad_id=denoiser.pad_id,
        max_new_tokens=parts.sampling.max_new_tokens,
        pad_to_canvas=getattr(parts.algorithm.config, "pad_to_canvas", False),
        block_size=denoiser.block_size,
        block_origin=denoiser.block_origin,
    )
    n = len(batch)
    status: tuple[RewardStatus, ...] = tuple("ok" for _ in range(n))
    total = torch.tensor([float(place == 0) for texts in completions for place in range(len(texts))])
    included = torch.ones(n, dtype=torch.bool)
    rewards = Rewards(components={}, total=total, included=included, solved=total >= 1, status=status)
    return Collected(batch=batch, rewards=rewards, metrics={}, samples=())
