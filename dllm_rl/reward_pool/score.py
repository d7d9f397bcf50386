"""From decoded completions to rewards: what columns a verifier sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
