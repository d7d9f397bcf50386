"""What every reward function must keep to; see dllm_rl.protocols.reward. It runs in the real worker processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_rl import registry
from dllm_rl.config.plugins import build
from dllm_rl.config.schema import RewardPlugin
from dllm_rl.conformance.violation import require
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.types import Example, Rewards

HOSTILE = (
    "",
    " \n\t ",
    "\x00",
    "42",
    "-1e309",
    "44**19**35",
    "\\boxed{" * 200,
    "\\frac{1}{0}",
    "(" * 2000,
    "9" * 5000,
    "é你好\u202e🙂",
    "None",
    "x" * 20_000,
    "<answer></answer>",
)
TIMEOUT_S = 5.0


class Subject:
    """A reward function in a pool of two workers, and rows to score."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.columns = example_columns(name)
        self.pool = RewardPool([RewardPlugin(name=name, timeout_s=TIMEOUT_S, **options)])

    def close(self) -> None:
        """End the workers."""
        self.pool.close()

    def score(self, texts: list[str]) -> Rewards:
        """Score texts as completions of one example."""
        columns = {key: [value] * len(texts) for key, value in self.columns.items()}
        columns["completion_tokens"] = [max(1, len(text)) for text in texts]
        return self.pool.score(["prompt"] * len(texts), texts, columns)


def example_columns(reward: str) -> dict[str, Any]:
    """Columns of an example of the tasks that make their own data; those that use this reward have the last word."""
    columns: dict[str, Any] = {"answer": "42"}
    made = [build("tasks", name, {}) for name in registry.names("tasks") if not reads_files(name)]
    for task in sorted(made, key=lambda task: reward in task.rewards):
        example: Example = task.examples("test")[0]
        columns |= {**example.columns, "answer": example.answer}
    return columns


def reads_files(task: str) -> bool:
    """Whether a task reads data files or the hub instead of making its examples."""
    return "train_file" in getattr(registry.load("tasks", task).Config, "__dataclass_fields__", {})


def every_text_gets_a_verdict(subject: Subject) -> None:
    """No text makes it raise, hang, miss a row or give infinity: what it cannot score is a low reward or None."""
    for begin in range(0, len(HOSTILE), 4):
        texts = list(HOSTILE[begin : begin + 4])
        scored = subject.score(texts)
        for row, text in enumerate(texts):
            failure = next((str(f) for f in subject.pool.failures if f.completion == text), "")
            require(bool(scored.included[row]), f"{scored.status[row]} on {text[:40]!r}: {failure:.200}")


def equal_texts_get_equal_rewards(subject: Subject) -> None:
    """The reward of a completion does not depend on when it is scored, nor on the rows beside it."""
    texts = list(HOSTILE)
    together = subject.score(texts)
    turned = subject.score(texts[::-1])
    alone = [subject.score([text]) for text in texts]
    for name, values in together.components.items():
        for row, text in enumerate(texts):
            seen = [values[row], turned.components[name][-1 - row], alone[row].components[name][0]]
            numbers = {"none" if value.isnan() else value.item() for value in seen}
            require(
                len(numbers) == 1, f"{text[:40]!r} got {[v.item() for v in seen]} in a batch, in reverse, and alone"
            )
