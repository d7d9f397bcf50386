"""Before training starts: the deployed reward workers must reward a gold answer and refuse a wrong one."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from dllm_rl import registry
from dllm_rl.errors import UserError, nearest
from dllm_rl.protocols.task import Task
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.reward_pool.score import columns_of
from dllm_rl.types import Example

# What reward functions may take by name beside the columns of the data; the last two are TRL's.
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state")
_SKIP = "reward_pool.self_test=0 leaves this check out"


def run_self_test(pool: RewardPool, task: Task, examples: Sequence[Example]) -> None:
    """Score a gold and a wrong completion of each example in the pool that training will use.

    Of a reward that does not compare with the right answer (see dllm_rl.protocols.reward), and of examples that have
    none, only values are asked for. Also holds evaluation to its word: the component that means success must be among
    the rewards.

    Args:
        pool: the deployed pool.
        task: says what is gold, what is wrong, and which component means success; if none does, the first one.
        examples: rows to check; none = no check.
    Raises:
        UserError: naming the first example that was scored wrongly.
    """
    chosen = task.success or pool.names[0]
    if chosen not in pool.names:
        raise UserError(
            f"reward self-test: the task counts reward '{chosen}' as success, but rewards lists "
            f"{', '.join(pool.names)}; list it too (weight 0 only reports it)"
        )
    if not examples:
        return
    for name in pool.names:
        _check_arguments(name, columns_of(examples, [1] * len(examples)))
    compares = _compares(chosen)
    rows: list[tuple[Example, str, bool | None]] = []  # with what is expected: full marks, less, or any value
    for example in examples:
        pair = task.self_test(example) if compares else None
        if pair is None:
            rows.append((example, example.completion or "", None))
        else:
            rows += [(example, pair[0], True), (example, pair[1], False)]
    asked, texts = [example for example, _, _ in rows], [text for _, text, _ in rows]
    chats = [None if isinstance(e.prompt, str) else e.prompt for e in asked]  # functions see them as in training
    rewards = pool.score([str(e.prompt) for e in asked], texts, columns_of(asked, [1] * len(rows)), messages=chats)
    for name, values in rewards.components.items():
        if bool((values.isnan() & rewards.included).all()):
            raise UserError(
                f"reward self-test: '{name}' gave no reward (None or NaN) for any of {len(texts)} completions, so it "
                f"would teach nothing; return a number where it applies, or take it out of 'rewards:' ({_SKIP})"
            )
    success = rewards.components[chosen]
    for row, (example, text, gold) in enumerate(rows):
        if not bool(rewards.included[row]):
            raise UserError(
                f"reward self-test: example '{example.uid}' could not be scored: {pool.failures[-1]}; {_SKIP}"
            )
        if gold is not None and (success[row] >= 1) != gold:
            raise UserError(
                f"reward self-test: {'gold' if gold else 'wrong'} completion {text[-60:]!r} of example '{example.uid}' "
                f"scored {success[row]:g} in '{chosen}', expected {'at least 1' if gold else 'less than 1'}; "
                f"{_remedy(task, example, chosen)}"
            )


def _remedy(task: Task, example: Example, name: str) -> str:
    """What to change: the reward, what the task takes for right, or what the reward says of itself."""
    own = hasattr(task.config, "gold") and example.completion is None
    option = f", or data.task.gold, which is {task.config.gold!r}" if own else ""
    return f"mend the reward{option}; if '{name}' does not compare with an answer, give it the attribute gold = False"


def _compares(name: str) -> bool:
    """Whether a reward compares with the right answer, as it declares or as its arguments show."""
    plugin = registry.load("rewards", name)
    declared = getattr(plugin, "gold", None)
    return declared if isinstance(declared, bool) else "answer" in _parameters(plugin)


def _parameters(plugin: Any) -> dict[str, inspect.Parameter]:
    call = plugin.__call__ if isinstance(plugin, type) else plugin
    found = dict(inspect.signature(call).parameters)
    found.pop("self", None)
    return found


def _check_arguments(name: str, columns: Iterable[str]) -> None:
    """Refuse a reward that needs an argument which nothing gives.

    Raises:
        UserError: naming the nearest column.
    """
    known = [*_GIVEN, *columns]
    parameters = list(_parameters(registry.load("rewards", name)).values())
    if not {"prompts", "completions"} & {p.name for p in parameters}:
        parameters = parameters[2:]  # whatever it calls them
    for p in parameters:
        optional = p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if not optional and p.name not in known:
            raise UserError(
                f"reward '{name}': its argument '{p.name}' is no column of the data{nearest(p.name, known)}"
            )
