"""From decoded completions to rewards: what columns a verifier sees."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch

from dllm_rl import registry
from dllm_rl.errors import RunStopped, UserError
from dllm_rl.protocols.rollouter import Turn
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.types import Example, Prompt, Rewards, Trajectory

WARN_FRACTION = 0.05  # of the rows of a step


def score_completions(
    pool: RewardPool,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    lengths: Sequence[int],
    *,
    trajectories: Sequence[Trajectory] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> Rewards:
    """Score one completion per prompt.

    Args:
        pool: reward workers.
        prompts: one per completion (repeat a prompt for each of its samples).
        texts: completions without EOS.
        lengths: completion lengths in tokens.
        trajectories: of the completions; plain functions are handed their tokens as ``completion_ids``.
        groups: what the completions of a prompt have in common; None = the uid of their prompt.
    Returns:
        Rewards of the rows; verifiers receive the columns ``answer``, ``completion_tokens`` and the task's own.
    """
    return pool.score(
        [prompt.text for prompt in prompts],
        list(texts),
        columns_of(prompts, lengths),
        groups=[prompt.uid for prompt in prompts] if groups is None else groups,
        messages=[prompt.messages for prompt in prompts],
        completion_ids=None if trajectories is None else [_completion_ids(one) for one in trajectories],
    )


def _completion_ids(trajectory: Trajectory) -> list[int]:
    begin = trajectory.prompt_length
    ids: list[int] = trajectory.tokens[begin : begin + trajectory.completion_length].tolist()
    return ids


def columns_of(rows: Sequence[Prompt | Example], lengths: Sequence[int]) -> dict[str, list[Any]]:
    """What verifiers are given beside prompts and completions."""
    names = sorted({name for row in rows for name in row.columns})
    columns: dict[str, list[Any]] = {name: [row.columns.get(name) for row in rows] for name in names}
    return columns | {"answer": [row.answer for row in rows], "completion_tokens": list(lengths)}


def require_scored(pool: RewardPool, rewards: Rewards, *, limit: float, step: int) -> None:
    """Stop a run whose rewards fail.

    Args:
        pool: that gave the rewards.
        rewards: of a step.
        limit: share of the rows that may fail, reward_pool.max_failure_fraction.
        step: of the run.
    Raises:
        UserError: more failed, the last one by a reward function of the user's that broke its contract.
        RunStopped: more failed otherwise.
    """
    failed = 1 - rewards.included.float().mean().item()
    if failed > limit:
        last = pool.failures[-1]
        theirs = last.status == "error" and not registry.is_ours(registry.load("rewards", last.reward).__module__)
        raise (UserError if theirs else RunStopped)(
            f"step {step}: {failed:.0%} of the completions could not be scored (reward_pool.max_failure_fraction = "
            f"{limit}); last failure: {last}"
        )


def failure_summary(pool: RewardPool, rewards: Rewards, *, limit: float) -> str:
    """One line on the rows of a batch that could not be scored, each reason once in a run; "" if all were scored.

    Args:
        pool: that gave the rewards.
        rewards: of a batch.
        limit: as in require_scored; the line is a warning from WARN_FRACTION on.
    """
    reasons = Counter(text for text, ok in zip(rewards.reasons, rewards.included.tolist(), strict=True) if not ok)
    failed, rows = reasons.total(), len(rewards.reasons)
    if not failed:
        return ""
    timed_out = sum(status == "timeout" for status in rewards.status)
    line = f"{failed} of {rows} completions could not be scored ({timed_out} timed out)"
    if failed >= WARN_FRACTION * rows:
        line = f"warning: {line}, the run stops above reward_pool.max_failure_fraction = {limit:g}"
    new = [reason for reason, _ in reasons.most_common(3) if reason not in pool.shown]
    pool.shown.update(new)
    return f"{line}: {'; '.join(new)}" if new else line


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
    if pool.blank_truncated:
        texts = ["" if t.trajectory.finish == "length" else text for t, text in zip(turns, texts, strict=True)]
    last = {turn.episode: row for row, turn in enumerate(turns)}
    row_of = [last[turn.episode] if rewarded == "episode" else row for row, turn in enumerate(turns)]
    rows = sorted(set(row_of))
    trajectories = [turns[row].trajectory for row in rows]
    scored = score_completions(
        pool,
        [turns[row].prompt for row in rows],
        [texts[row] for row in rows],
        [trajectory.completion_length for trajectory in trajectories],
        trajectories=trajectories,
        groups=[(turns[row].group, turns[row].turn if rewarded == "turn" else 0) for row in rows],
    )
    rewards = scored.select(torch.searchsorted(torch.tensor(rows), torch.tensor(row_of)))
    if any(turn.reward is not None for turn in turns):
        given = torch.tensor([float("nan") if turn.reward is None else turn.reward for turn in turns])
        total = rewards.total + given.nan_to_num(0.0)
        rewards = dataclasses.replace(rewards, components={**rewards.components, "environment": given}, total=total)
    every = list(zip(turns, rewards.status, rewards.included.tolist(), strict=True))
    failed = {turn.episode: status for turn, status, ok in every if not ok}
    why = {turn.episode: text for turn, text in zip(turns, rewards.reasons, strict=True) if text}
    included = torch.tensor([turn.episode not in failed for turn in turns])
    return dataclasses.replace(
        rewards,
        total=rewards.total.masked_fill(~included, 0.0),
        included=included,
        solved=rewards.solved & included,
        status=tuple(failed.get(turn.episode, status) for turn, status, _ in every),
        reasons=tuple(why.get(turn.episode, "") for turn in turns),
    )
