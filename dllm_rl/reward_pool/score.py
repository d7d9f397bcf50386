"""From decoded completions to rewards: what columns a verifier sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch

from dllm_rl.protocols.rollouter import Turn
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.types import Prompt, Rewards


def judge(pool: RewardPool, prompts: Sequence[Prompt], texts: Sequence[str], lengths: Sequence[int]) -> Rewards:
    """Score one completion per prompt.

    Args:
        pool: reward workers.
        prompts: one per completion (repeat a prompt for each of its samples).
        texts: completions without EOS.
        lengths: completion lengths in tokens.
    Returns:
        Rewards of the rows; verifiers receive the columns ``answer``, ``completion_tokens`` and the task's own.
    """
    names = sorted({name for prompt in prompts for name in prompt.columns})
    columns: dict[str, list[Any]] = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    columns["answer"] = [prompt.answer for prompt in prompts]
    columns["completion_tokens"] = list(lengths)
    return pool.score([prompt.text for prompt in prompts], list(texts), columns)


def score_turns(
    pool: RewardPool, turns: Sequence[Turn], texts: Sequence[str], rewarded: Literal["episode", "turn"]
) -> Rewards:
    """Score the turns of a batch.

    Args:
        pool: reward workers.
        turns: the rows; those of an episode in their order.
        texts: their completions without EOS.
        rewarded: see protocols.Rollouter.
    Returns:
        Rewards of the rows. An episode is excluded as a whole: what its other turns would be compared with has failed.
    """
    last = {turn.episode: row for row, turn in enumerate(turns)}
    row_of = [last[turn.episode] if rewarded == "episode" else row for row, turn in enumerate(turns)]
    rows = sorted(set(row_of))
    lengths = [turns[row].trajectory.completion_length for row in rows]
    scored = judge(pool, [turns[row].prompt for row in rows], [texts[row] for row in rows], lengths)
    rewards = scored.select(torch.searchsorted(torch.tensor(rows), torch.tensor(row_of)))
    if any(turn.reward is not None for turn in turns):
        given = torch.tensor([float("nan") if turn.reward is None else turn.reward for turn in turns])
        total = rewards.total + given.nan_to_num(0.0)
        rewards = dataclasses.replace(rewards, components={**rewards.components, "environment": given}, total=total)
    every = list(zip(turns, rewards.status, rewards.included.tolist(), strict=True))
    failed = {turn.episode: status for turn, status, ok in every if not ok}
    included = torch.tensor([turn.episode not in failed for turn in turns])
    return dataclasses.replace(
        rewards,
        total=rewards.total.masked_fill(~included, 0.0),
        included=included,
        solved=rewards.solved & included,
        status=tuple(failed.get(turn.episode, status) for turn, status, _ in every),
    )
