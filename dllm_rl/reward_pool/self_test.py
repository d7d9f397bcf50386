"""Before training starts: the deployed reward workers must reward a gold answer and refuse a wrong one."""

from __future__ import annotations

from collections.abc import Sequence

from dllm_rl.errors import UserError
from dllm_rl.protocols.task import Task
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.reward_pool.score import columns_of
from dllm_rl.types import Example


def run_self_test(pool: RewardPool, task: Task, examples: Sequence[Example]) -> None:
    """Score a gold and a wrong completion of each example in the pool that training will use.

    Also holds evaluation to its word: the component that means success must be among the rewards.

    Args:
        pool: the deployed pool.
        task: says what is gold, what is wrong, and which component means success.
        examples: rows to check; none = no check.
    Raises:
        UserError: naming the first example that was scored wrongly.
    """
    have = ", ".join(pool.names)
    if not task.success:
        raise UserError(f"reward self-test: which of the rewards {have} means success? Set data.task.success")
    if task.success not in pool.names:
        raise UserError(
            f"reward self-test: the task counts reward '{task.success}' as success, but rewards lists {have}; list it "
            f"too (weight 0 only reports it)"
        )
    if not examples:
        return
    pairs = [task.self_test(example) for example in examples]
    twice = [example for example in examples for _ in range(2)]
    texts = [text for pair in pairs for text in pair]
    rewards = pool.score([str(e.prompt) for e in twice], texts, columns_of(twice, [1] * len(twice)))
    for name, values in rewards.components.items():
        if bool((values.isnan() & rewards.included).all()):
            raise UserError(
                f"reward self-test: '{name}' gave no reward (None or NaN) for any of {len(texts)} completions, so it "
                f"would teach nothing; return a number where it applies, or take it out of 'rewards:'"
            )
    success = rewards.components[task.success]
    for row, text in enumerate(texts):
        example, gold = examples[row // 2], row % 2 == 0
        if not bool(rewards.included[row]):
            raise UserError(f"reward self-test: example '{example.uid}' could not be scored: {pool.failures[-1]}")
        if (success[row] >= 1) != gold:
            expected = "at least 1" if gold else "less than 1"
            raise UserError(
                f"reward self-test: {'gold' if gold else 'wrong'} completion {text[-60:]!r} of example '{example.uid}' "
                f"scored {success[row]:g} in '{task.success}', expected {expected}; fix the reward before training"
            )
