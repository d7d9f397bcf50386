"""Collects what a step learns from: fresh scored rollouts, or demonstrations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from dllm_rl import seeding
from dllm_rl.config.schema import Config
from dllm_rl.data.collate import completion_texts, supervised
from dllm_rl.driver.build import Run
from dllm_rl.driver.decoder import BatchDecoder, PartialBatch
from dllm_rl.driver.drawn import Drawn, collated, normalised
from dllm_rl.driver.resample import resample
from dllm_rl.protocols.algorithm import ExtraRollout, ExtraRollouts
from dllm_rl.protocols.engine import TRAIN
from dllm_rl.protocols.rollouter import Decoder, Turn, check_turns
from dllm_rl.reports.clock import Clock
from dllm_rl.reports.measure import rollout_metrics
from dllm_rl.reward_pool.score import failure_summary, require_scored, score_turns
from dllm_rl.types import Prompt, Rewards, RewardStatus, RolloutBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What a step learns from, and what the run's records say about it.

    Attributes:
        batch: the rows.
        rewards: theirs.
        metrics: of the batch.
        samples: of each row, for samples.jsonl.
        uids: of the prompts that it was made from.
        seconds: how long its parts took.
        failures: one line for each draw of which rows could not be scored.
    """

    batch: RolloutBatch
    rewards: Rewards
    metrics: dict[str, float]
    samples: Sequence[dict[str, Any]]
    uids: Sequence[str]
    seconds: dict[str, float] = field(default_factory=dict)
    failures: Sequence[str] = ()


def roll_out(run: Run, config: Config, prompts: Sequence[Prompt], step: int, timer: Clock) -> Collected:
    """Decode and collect in one go."""
    return collect(run, config, prompts, BatchDecoder(run, config, step, PartialBatch(seconds=timer.seconds)), timer)


def decode(run: Run, config: Config, prompts: Sequence[Prompt], decoder: Decoder) -> list[Turn]:
    """The turns of samples_per_prompt samples of every prompt, as the rollouter makes them."""
    size = config.data.samples_per_prompt
    turns = run.rollouter.roll_out(prompts, decoder, samples_per_prompt=size)
    check_turns(turns, prompts, samples_per_prompt=size, multi_turn=run.rollouter.multi_turn)
    return turns


def collect(
    run: Run,
    config: Config,
    prompts: Sequence[Prompt],
    decoder: BatchDecoder,
    timer: Clock,
    engines: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Collected:
    """Decode and score a batch; then what its flat groups are replaced by, or what the algorithm asks for.

    Args:
        run: its parts.
        config: of the run.
        prompts: of the batch.
        decoder: of the batch.
        timer: told how long its parts take.
        engines: held while nobody else may decode or score.
    Raises:
        UserError, RunStopped: more than reward_pool.max_failure_fraction of the rows could not be scored.
    """
    seed, step = config.run.seed, decoder.step
    assert run.reward_pool is not None, "build_run() refuses rollouts without rewards"
    pool = run.reward_pool
    failures: list[str] = []

    def draw(prompts: Sequence[Prompt]) -> Drawn:
        turns = decode(run, config, prompts, decoder)
        with engines():
            pool.begin_step(step)
            drawn = _scored(run, turns, timer)
        limit = config.reward_pool.max_failure_fraction
        require_scored(pool, drawn.rewards, limit=limit, step=step)
        failures.extend(filter(None, [failure_summary(pool, drawn.rewards, limit=limit)]))
        return drawn

    drawn = draw(prompts)
    batch, rewards = collated(run, drawn), drawn.rewards
    metrics = rollout_metrics(batch, rewards)
    if config.data.resample_flat_groups:
        prompts, drawn, figures = resample(run, config, prompts, drawn, step, draw)
        batch, rewards = collated(run, drawn), drawn.rewards
        metrics |= figures | {f"resampled/{name}": value for name, value in rollout_metrics(batch, rewards).items()}
    rows = list(range(len(batch)))
    if isinstance(run.algorithm, ExtraRollouts):
        generator = seeding.generator_for(seed, "further", step)
        canvas = run.sampling.max_new_tokens
        further = run.algorithm.extra_rollouts(prompts, rewards, batch, canvas=canvas, generator=generator)
        for number, kind in enumerate(_kinds(further)):
            with engines():
                more = _draw(run, kind, seeding.derive(seed, "further", step, number), timer)
            drawn = Drawn.join(drawn, more)
        if further:
            everything = collated(run, drawn)
            added = torch.arange(len(everything)) >= len(batch)
            chosen = run.algorithm.select_rows(added, drawn.rewards, everything, generator)
            batch, rewards, rows = everything.select(chosen), drawn.rewards.select(chosen), chosen.tolist()
            metrics |= {f"guided/{name}": value for name, value in rollout_metrics(batch, rewards).items()}
    said = completion_texts([drawn.turns[row].trajectory for row in rows], run.tokenizer, special=True)
    several = any(turn.turn for turn in drawn.turns)
    return Collected(
        batch=batch,
        rewards=normalised(run, config, rewards, batch),
        metrics=metrics,
        samples=[_sample(drawn, row, text, several=several) for row, text in zip(rows, said, strict=True)],
        uids=[prompt.uid for prompt in prompts],
        seconds=timer.seconds,
        failures=failures,
    )


def logged_samples(samples: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The first samples, and the first of those after them that could not be scored; at most limit of each."""
    return [*samples[:limit], *[sample for sample in samples[limit:] if "reason" in sample][:limit]]


def _sample(drawn: Drawn, row: int, said: str, *, several: bool) -> dict[str, Any]:
    """A row of samples.jsonl: what was generated, special tokens included; which turn it is if there are several."""
    turn = drawn.turns[row]
    where = {"episode": turn.episode, "turn": turn.turn} if several else {}
    why = {"reason": drawn.rewards.reasons[row]} if drawn.rewards.reasons[row] else {}
    return {
        "uid": turn.prompt.uid,
        **where,
        "prompt": turn.prompt.text,
        "completion": said,
        "answer": turn.prompt.answer,
        "reward": drawn.rewards.total[row].item(),
        "status": drawn.rewards.status[row],
        **why,
        "num_forwards": turn.trajectory.num_forwards,
    }


def _kinds(further: Sequence[ExtraRollout]) -> Sequence[Sequence[ExtraRollout]]:
    """ExtraRollout rollouts by how they are decoded: one engine call each."""
    kinds: dict[str, list[ExtraRollout]] = {}
    for one in further:
        kinds.setdefault(repr((one.strategy, one.block_size)), []).append(one)
    return list(kinds.values())


def _draw(run: Run, wanted: Sequence[ExtraRollout], seed: int, timer: Clock) -> Drawn:
    """Decode and score rollouts of one kind."""
    strategy, block_size = wanted[0].strategy, wanted[0].block_size
    sampling = run.sampling if block_size is None else dataclasses.replace(run.sampling, block_size=block_size)
    with timer("rollout_s"):
        found = run.engines.generate([w.prompt for w in wanted], sampling, seed=seed, role=strategy or TRAIN)
    turns = [
        Turn(trajectory=trajectory, prompt=w.prompt, group=w.group, episode=number)
        for number, (trajectory, w) in enumerate(zip(found, wanted, strict=True))
    ]
    return _scored(run, turns, timer, expert=strategy is not None)


def _scored(run: Run, turns: list[Turn], timer: Clock, *, expert: bool = False) -> Drawn:
    assert run.reward_pool is not None, "build_run() refuses rollouts without rewards"
    texts = completion_texts([turn.trajectory for turn in turns], run.tokenizer)
    with timer("reward_s"):
        rewards = score_turns(run.reward_pool, turns, texts, run.rollouter.rewarded)
    return Drawn(turns, [expert] * len(turns), rewards)


def demonstrate(run: Run, prompts: Sequence[Prompt]) -> Collected:
    """The reference completions of the prompts with reward 1; of pairs, the chosen one with 1, the rejected with 0."""
    completions = [run.demonstrations[prompt.uid] for prompt in prompts]
    batch = supervised(
        [prompt for prompt, texts in zip(prompts, completions, strict=True) for _ in texts],
        [text for texts in completions for text in texts],
        run.denoiser,
        group=[number for number, texts in enumerate(completions) for _ in texts],
        max_new_tokens=run.sampling.max_new_tokens,
        pad_to_canvas=getattr(run.algorithm.config, "pad_to_canvas", False),
    )
    n = len(batch)
    status: tuple[RewardStatus, ...] = tuple("ok" for _ in range(n))
    total = torch.tensor([float(place == 0) for texts in completions for place in range(len(texts))])
    included = torch.ones(n, dtype=torch.bool)
    rewards = Rewards(components={}, total=total, included=included, solved=total >= 1, status=status)
    uids = [prompt.uid for prompt in prompts]
    return Collected(batch=batch, rewards=rewards, metrics={}, samples=(), uids=uids)
