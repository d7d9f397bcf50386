"""Users' own rows, in TRL's data set formats: prompt-only, prompt-completion, preference; text or conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dllm_rl.errors import UserError
from dllm_rl.protocols.task import Task
from dllm_rl.tasks.rows import read_rows
from dllm_rl.types import Example

_RESERVED = ("prompts", "completions", "completion_tokens")  # what reward functions receive besides columns
_ROLES = ("system", "user", "assistant", "tool")


class JsonLines(Task):
    """Rows of a local file.

    A row has ``prompt``, and for supervised training ``completion``, or for preferences ``chosen`` and ``rejected``;
    all of them text, or all of them message lists (a completion is then one assistant message). The kind of the first
    row is the kind of every row. Further columns reach reward functions under their own names.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        train_file: str  # .jsonl, .json, or gzipped
        test_file: str | None = None  # null = no held-out evaluation
        prompt: str = "prompt"  # name of the prompt column
        answer: str = "answer"  # name of the column that verifiers compare with; it may be missing
        trace: str = ""  # name of the column with the reasoning before the answer, for algorithms that give hints
        success: str = ""  # reward whose value >= 1 counts as solved, e.g. math_answer; also the default reward
        gold: str = "\\boxed{{answer}}"  # what must score full before training starts; {answer} is filled in
        limit: int | None = None  # only the first rows of each file

        def __post_init__(self) -> None:
            if self.limit is not None and self.limit < 1:
                raise UserError(f"limit = {self.limit}: must be at least 1, or null for every row")

    characters = ""
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.success = config.success  # type: ignore[misc]  # here the user says it, row by row nothing does
        self.rewards = (config.success,) if config.success else ()  # type: ignore[misc]

    def examples(self, split: Literal["train", "test"]) -> Sequence[Example]:
        """The rows in the order of the file; no test file means no test rows."""
        c = self.config
        path = c.train_file if split == "train" else c.test_file
        if path is None:
            return []
        rows = read_rows(path, c.limit)
        examples = [self._example(f"{Path(path).name}-{i}", row, where) for i, (where, row) in enumerate(rows)]
        kind = self._kind(rows[0][1])
        for where, row in rows:
            if self._kind(row) != kind:
                raise UserError(f"{where}: is {self._kind(row)}, but the first row is {kind}; use one file for each")
        return examples

    def self_test(self, example: Example) -> tuple[str, str]:
        """The reference completion (or the filled-in ``gold``), and nothing at all."""
        if example.completion is not None:
            return example.completion, ""
        if not example.answer:
            raise UserError(
                f"example '{example.uid}' has neither completion nor answer to check the rewards with; add an "
                f"'{self.config.answer}' column, or set reward_pool.self_test=0"
            )
        return self.config.gold.replace("{answer}", example.answer), ""

    def _kind(self, row: dict[str, Any]) -> str:
        form = "text" if isinstance(row[self.config.prompt], str) else "conversation"
        kind = "preference" if "chosen" in row else "prompt-completion" if "completion" in row else "prompt-only"
        return f"{kind} {form} {'with' if self.config.answer in row else 'without'} '{self.config.answer}'"

    def _example(self, uid: str, row: dict[str, Any], where: str) -> Example:
        c = self.config
        if c.prompt not in row:
            raise UserError(f"{where}: no column '{c.prompt}'; the row has {', '.join(row) or 'none'}")
        if ("chosen" in row) != ("rejected" in row) or ("chosen" in row and "completion" in row):
            raise UserError(f"{where}: a row has 'completion', or both 'chosen' and 'rejected', or none of the three")
        prompt = _prompt(row[c.prompt], f"{where}: column '{c.prompt}'")
        texts = {
            name: _completion(row[name], isinstance(prompt, list), f"{where}: column '{name}'")
            for name in ("completion", "chosen", "rejected")
            if name in row
        }
        columns = {k: v for k, v in row.items() if k not in (c.prompt, c.answer, c.trace, *texts)}
        if c.trace and not (isinstance(row.get(c.trace), str) and row[c.trace]):
            raise UserError(f"{where}: column '{c.trace}' is {row.get(c.trace)!r:.60}, expected the reasoning as text")
        for name in _RESERVED:
            if name in columns:
                raise UserError(f"{where}: column '{name}' has the name of an argument of reward functions; rename it")
        return Example(
            uid=uid,
            prompt=prompt,
            answer=_answer(row[c.answer], f"{where}: column '{c.answer}'") if c.answer in row else "",
            task="jsonl",
            trace=row[c.trace] if c.trace else None,
            columns=columns,
            **texts,
        )


def _prompt(value: Any, what: str) -> str | list[dict[str, str]]:
    if isinstance(value, str) and value:
        return value
    messages = _messages(value, what)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{what}: ends with an assistant message; that belongs into 'completion'")
    return messages


def _completion(value: Any, conversation: bool, what: str) -> str:
    """The text of a completion: as it is, or the content of its one assistant message."""
    if isinstance(value, str) and value:
        if conversation:
            raise UserError(f"{what}: is text, but the prompt is a message list; both must be of one form")
        return value
    messages = _messages(value, what)
    if not conversation:
        raise UserError(f"{what}: is a message list, but the prompt is text; both must be of one form")
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(f"{what}: must be exactly one assistant message")
    return messages[0]["content"]


def _messages(value: Any, what: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{what} is {value!r:.60}, expected text or a list of messages, not empty")
    for place, message in enumerate(value, start=1):
        good = isinstance(message, dict) and set(message) == {"role", "content"} and message["role"] in _ROLES
        if not good or not isinstance(message["content"], str):
            raise UserError(
                f'{what}: message {place} is {message!r:.60}, expected {{"role": one of {", ".join(_ROLES)}, '
                f'"content": text}}'
            )
    return value


def _answer(value: Any, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise UserError(f"{what} is {value!r:.60}, expected text or a number")
    return str(value)
