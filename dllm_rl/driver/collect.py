"""Collects what a step learns from: fresh scored rollouts, or demonstrations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from dllm_rl import seeding
from dllm_rl.config.schema import Config
from dllm_rl.data.collate import collate, completion_texts, supervised
from dllm_rl.driver.build import Run
from dllm_rl.errors import RunStopped
from dllm_rl.protocols.algorithm import ExtraRollout, ExtraRollouts
from dllm_rl.reports.measure import rollout_metrics
from dllm_rl.reward_pool.score import judge
from dllm_rl.types import Prompt, Rewards, RewardStatus, RolloutBatch, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A batch with its rewards, its metrics, rows for samples.jsonl, and the prompts that it was made from."""

    batch: RolloutBatch
    rewards: Rewards
    metrics: dict[str, float]
    samples: Sequence[dict[str, Any]]
    uids: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Judged rollouts before they are a batch; one entry per row."""

    trajectories: list[Trajectory]
    prompts: list[Prompt]
    texts: list[str]
    group: list[int]
    expert: list[bool]
    rewards: Rewards

    @staticmethod
    def join(first: _Drawn, second: _Drawn) -> _Drawn:
        """The rows of both."""
        return _Drawn(
            first.trajectories + second.trajectories,
            first.prompts + second.prompts,
            first.texts + second.texts,
            first.group + second.group,
            first.expert + second.expert,
            Rewards.join(first.rewards, second.rewards),
        )


def roll_out(
    run: Run,
    config: Config,
    prompts: Sequence[Prompt],
    step: int,
    timer: Callable[[str], AbstractContextManager[None]],
) -> Collected:
    """Decode and collect in one go."""
    return collect(run, config, prompts, decode(run, config, prompts, step, timer), step, timer)


def decode(
    run: Run,
    config: Config,
    prompts: Sequence[Prompt],
    step: int,
    timer: Callable[[str], AbstractContextManager[None]],
    *,
    partial: Sequence[Trajectory] | None = None,
    max_blocks: int | None = None,
) -> list[Trajectory]:
    """Decode samples_per_prompt completions per prompt, or go on with partial ones; see RolloutEngine.generate."""
    key, size = seeding.derive(config.run.seed, "rollout", step), config.data.samples_per_prompt
    with timer("rollout_s"):
        return run.engine.generate(
            prompts, run.sampling, seed=key, samples_per_prompt=size, partial=partial, max_blocks=max_blocks
        )


def collect(
    run: Run,
    config: Config,
    prompts: Sequence[Prompt],
    trajectories: list[Trajectory],
    step: int,
    timer: Callable[[str], AbstractContextManager[None]],
) -> Collected:
    """Judge what was decoded; then decode and judge further completions that the algorithm asks for.

    Raises:
        RunStopped: more than reward_pool.max_failure_fraction of the rows could not be scored.
    """
    seed, size = config.run.seed, config.data.samples_per_prompt
    wanted = [ExtraRollout(group=number, prompt=prompt) for number, prompt in enumerate(prompts) for _ in range(size)]
    drawn = _judged(run, wanted, trajectories, timer)
    failed = 1 - drawn.rewards.included.float().mean().item()
    if failed > config.reward_pool.max_failure_fraction:
        assert run.reward_pool is not None, "it has just scored"
        raise RunStopped(
            f"step {step}: {failed:.0%} of the completions could not be scored (reward_pool.max_failure_fraction = "
            f"{config.reward_pool.max_failure_fraction}); last failure: {run.reward_pool.failures[-1]}"
        )
    batch, rewards = _collate(run, drawn), drawn.rewards
    metrics = rollout_metrics(batch, rewards)
    rows = list(range(len(batch)))
    if isinstance(run.algorithm, ExtraRollouts):
        generator = seeding.generator_for(seed, "further", step)
        canvas = run.sampling.max_new_tokens
        further = run.algorithm.extra_rollouts(prompts, rewards, batch, canvas=canvas, generator=generator)
        for number, kind in enumerate(_kinds(further)):
            more = _draw(run, kind, seeding.derive(seed, "further", step, number), timer)
            drawn = _Drawn.join(drawn, more)
        if further:
            everything = _collate(run, drawn)
            added = torch.arange(len(everything)) >= len(batch)
            chosen = run.algorithm.select_rows(added, drawn.rewards, everything, generator)
            batch, rewards, rows = everything.select(chosen), drawn.rewards.select(chosen), chosen.tolist()
            metrics |= {f"guided/{name}": value for name, value in rollout_metrics(batch, rewards).items()}
    samples = [
        {
            "uid": drawn.prompts[row].uid,
            "prompt": drawn.prompts[row].text,
            "completion": drawn.texts[row],
            "answer": drawn.prompts[row].answer,
            "reward": drawn.rewards.total[row].item(),
            "status": drawn.rewards.status[row],
            "num_forwards": drawn.trajectories[row].num_forwards,
        }
        for row in rows
    ]
    uids = [prompt.uid for prompt in prompts]
    return Collected(batch=batch, rewards=rewards, metrics=metrics, samples=samples, uids=uids)


def _kinds(further: Sequence[ExtraRollout]) -> Sequence[Sequence[ExtraRollout]]:
    """ExtraRollout rollouts by how they are decoded: one engine call each."""
    kinds: dict[str, list[ExtraRollout]] = {}
    for one in further:
        kinds.setdefault(repr((one.strategy, one.block_size)), []).append(one)
    return list(kinds.values())


def _draw(
    run: Run,
    wanted: Sequence[ExtraRollout],
    seed: int,
    timer: Callable[[str], AbstractContextManager[None]],
) -> _Drawn:
    """Decode and judge rollouts of one kind."""
    strategy, block_size = wanted[0].strategy, wanted[0].block_size
    engine = run.engine if strategy is None else run.expert_engine(strategy)
    sampling = run.sampling if block_size is None else dataclasses.replace(run.sampling, block_size=block_size)
    with timer("rollout_s"):
        trajectories = engine.generate([w.prompt for w in wanted], sampling, seed=seed)
    return _judged(run, wanted, trajectories, timer)


def _judged(
    run: Run,
    wanted: Sequence[ExtraRollout],
    trajectories: list[Trajectory],
    timer: Callable[[str], AbstractContextManager[None]],
) -> _Drawn:
    assert run.reward_pool is not None, "build_run() refuses rollouts without rewards"
    prompts = [w.prompt for w in wanted]
    texts = completion_texts(trajectories, run.tokenizer)
    with timer("reward_s"):
        rewards = judge(run.reward_pool, prompts, texts, [t.completion_length for t in trajectories])
    expert = [w.strategy is not None for w in wanted]
    return _Drawn(trajectories, prompts, texts, [w.group for w in wanted], expert, rewards)


def _collate(run: Run, drawn: _Drawn) -> RolloutBatch:
    denoiser = run.denoiser
    return collate(
        drawn.trajectories,
        pad_id=denoiser.pad_id,
        group=drawn.group,
        block_size=denoiser.block_size,
        block_origin=denoiser.block_origin,
        expert=drawn.expert,
    )


def demonstrate(run: Run, prompts: Sequence[Prompt]) -> Collected:
    """The reference completions of the prompts with reward 1; of pairs, the chosen one with 1, the rejected with 0."""
    denoiser = run.denoiser
    completions = [run.demonstrations[prompt.uid] for prompt in prompts]
    batch = supervised(
        [prompt for prompt, texts in zip(prompts, completions, strict=True) for _ in texts],
        [text for texts in completions for text in texts],
        group=[number for number, texts in enumerate(completions) for _ in texts],
        eos_id=denoiser.eos_id,
        pad_id=denoiser.pad_id,
        max_new_tokens=run.sampling.max_new_tokens,
        pad_to_canvas=getattr(run.algorithm.config, "pad_to_canvas", False),
        block_size=denoiser.block_size,
        block_origin=denoiser.block_origin,
    )
    n = len(batch)
    status: tuple[RewardStatus, ...] = tuple("ok" for _ in range(n))
    total = torch.tensor([float(place == 0) for texts in completions for place in range(len(texts))])
    included = torch.ones(n, dtype=torch.bool)
    rewards = Rewards(components={}, total=total, included=included, solved=total >= 1, status=status)
    uids = [prompt.uid for prompt in prompts]
    return Collected(batch=batch, rewards=rewards, metrics={}, samples=(), uids=uids)
