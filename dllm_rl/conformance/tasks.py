"""What every task must keep to; see dllm_rl.protocols.task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dllm_rl.config.plugins import build
from dllm_rl.config.schema import RewardPlugin
from dllm_rl.conformance.rewards import reads_files
from dllm_rl.conformance.violation import NotCheckable, require
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.protocols.task import Task
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.reward_pool.self_test import run_self_test
from dllm_rl.types import Example

SELF_TESTED = 32
Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


class Subject:
    """A task, its examples, and a second copy that made them again."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        if reads_files(name) and not options:
            example = f"dllm-rl check-plugin tasks {name} train_file=... test_file=..."
            raise NotCheckable(f"tasks/{name}: it reads data files; {example}")
        self.task: Task = build("tasks", name, options)
        self.examples: dict[Split, Sequence[Example]] = {split: self.task.examples(split) for split in SPLITS}
        self.again: Task = build("tasks", name, options)

    @property
    def everything(self) -> list[Example]:
        """Both splits."""
        return [example for split in SPLITS for example in self.examples[split]]


def examples_are_always_the_same(subject: Subject) -> None:
    """Both splits hold the same examples in the same order each time; training has at least one."""
    require(len(subject.examples["train"]), "the training split is empty")
    for split in SPLITS:
        first, second = list(subject.examples[split]), list(subject.again.examples(split))
        differ = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        require(differ is None and len(first) == len(second), f"{split}: example {differ} differs from call to call")


def uids_are_unique(subject: Subject) -> None:
    """No two examples of a split have the same uid."""
    for split in SPLITS:
        uid, times = (
            Counter(e.uid for e in subject.examples[split]).most_common(1)[0] if subject.examples[split] else ("", 1)
        )
        require(times == 1, f"{split}: uid '{uid}' occurs {times} times")


def held_out_examples_are_held_out(subject: Subject) -> None:
    """No prompt is in both splits."""
    both = {str(e.prompt) for e in subject.examples["train"]} & {str(e.prompt) for e in subject.examples["test"]}
    require(not both, f"{len(both)} prompts are in both splits, such as {min(both, default='')[:60]!r}")


def prompts_are_not_empty(subject: Subject) -> None:
    """Every prompt is text or a list of messages, not empty."""
    for example in subject.everything:
        require(
            isinstance(example.prompt, str | list) and example.prompt, f"'{example.uid}': prompt {example.prompt!r}"
        )


def characters_cover_the_texts(subject: Subject) -> None:
    """A character tokenizer made of ``characters`` and the training texts can write every held-out text."""
    if not subject.task.characters:
        return
    known = set(subject.task.characters) | {
        c for e in subject.examples["train"] for c in f"{e.prompt}{e.completion or ''}"
    }
    tokenizer = character_tokenizer("".join(sorted(known)))
    for example in subject.examples["test"]:
        text = f"{example.prompt}{example.completion or ''}"
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
        require(back == text, f"'{example.uid}': {text!r} comes back as {back!r}")


def gold_is_right_and_wrong_is_wrong(subject: Subject) -> None:
    """With the task's own rewards, the gold completion of self_test() succeeds and the wrong one does not."""
    task = subject.task
    require(bool(task.rewards) == bool(task.success), f"rewards {task.rewards}, but success '{task.success}'")
    if not task.rewards:
        return
    require(task.success in task.rewards, f"success = '{task.success}' is none of rewards {task.rewards}")
    with RewardPool([RewardPlugin(name=name) for name in task.rewards]) as pool:
        for split in SPLITS:
            try:
                run_self_test(pool, task, subject.examples[split][:SELF_TESTED])
            except ValueError as error:
                require(False, f"{split}: {error}")
