"""Mathematics word problems: GSM8K and MATH, from local files or from the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dllm_rl.errors import UserError
from dllm_rl.protocols.task import Task
from dllm_rl.tasks.files import field, hub_rows, read_rows
from dllm_rl.types import Example

INSTRUCTION = "Reason step by step, and put the final answer in \\boxed{}."
_WRONG = "73939133"  # a number that is the answer of no problem; the self_test refuses to start if it ever were
_CALCULATION = re.compile(r"<<[^<>]*>>")


class _WordProblems(Task):
    """What the two tasks share: a question, a boxed answer scored by math-verify, and where rows come from."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        train_file: str | None = None  # .jsonl, .json, .csv, .parquet; null = download from the hub
        test_file: str | None = None
        hub: str = ""  # name of the data set on the hub
        train_skip: tuple[int, ...] = ()  # numbers (from 1) of rows to leave out, e.g. those without an answer
        test_skip: tuple[int, ...] = ()
        limit: int | None = None  # only the first rows of each split
        chat: bool = True  # a user message for the chat template; false = plain text, for base models

        def __post_init__(self) -> None:
            if self.limit is not None and self.limit < 1:
                raise UserError(f"limit = {self.limit}: must be at least 1, or null for every row")

    name = ""
    hub_configuration: str | None = None  # None = every configuration
    rewards = ("math_answer",)
    success = "math_answer"
    characters = ""
    config: Config

    def examples(self, split: Literal["train", "test"]) -> Sequence[Example]:
        """The rows in the order of the file; malformed ones are all named before anything runs."""
        c = self.config
        path = c.train_file if split == "train" else c.test_file
        if path is None and (c.train_file or c.test_file):
            raise UserError(f"data.task.{split}_file is missing; give both files, or neither to use the hub")
        rows = hub_rows(c.hub, self.hub_configuration, split)[: c.limit] if path is None else read_rows(path, c.limit)
        skip = c.train_skip if split == "train" else c.test_skip
        examples: list[Example] = []
        malformed: dict[int, str] = {}
        for number, (where, row) in enumerate(rows, start=1):
            if number in skip:
                continue
            try:
                examples.append(self._example(f"{self.name}-{split}-{number}", row, where))
            except ValueError as error:
                malformed[number] = str(error)
        if malformed:
            first = next(iter(malformed.values()))
            shown = f"{list(malformed)}" if len(malformed) <= 20 else "[...]"
            raise UserError(
                f"{first}; {len(malformed)} of {len(rows)} rows are malformed. Mend the file, or leave them out: "
                f"data.task.{split}_skip={shown}"
            )
        if not examples:
            raise UserError(f"data.task.{split}_skip leaves out every row")
        return examples

    def self_test(self, example: Example) -> tuple[str, str]:
        """The boxed reference answer, and a boxed number that answers nothing."""
        return f"\\boxed{{{example.answer}}}", f"\\boxed{{{_WRONG}}}"

    def _example(self, uid: str, row: dict[str, Any], where: str) -> Example:
        question, answer, completion, trace = self._read(row, where)
        text = f"{question}\n\n{INSTRUCTION}"
        return Example(
            uid=uid,
            prompt=[{"role": "user", "content": text}] if self.config.chat else f"{text}\n\n",
            answer=answer,
            task=self.name,
            completion=completion,
            trace=trace,
        )

    def _read(self, row: dict[str, Any], where: str) -> tuple[str, str, str, str | None]:
        """(question, answer, completion, reasoning before the answer) of a row."""
        raise NotImplementedError


class GSM8K(_WordProblems):
    """Grade-school word problems with integer answers.

    Rows have ``question`` and ``answer`` (reasoning, then "#### 72"). The completion to imitate is the reasoning
    without its <<calculator annotations>>, then the boxed answer.

    Source: Cobbe et al. 2021, arXiv:2110.14168.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_WordProblems.Config):
        """Options."""

        hub: str = "openai/gsm8k"

    name = "gsm8k"
    hub_configuration = "main"  # the other one asks the same questions

    def _read(self, row: dict[str, Any], where: str) -> tuple[str, str, str, str | None]:
        question, solution = field(row, "question", where), field(row, "answer", where)
        reasoning, marker, final = solution.rpartition("####")
        answer = final.strip().replace(",", "")
        if not marker or not answer:
            raise UserError(f"{where}: column 'answer' does not end in '#### <number>': {solution[-40:]!r}")
        trace = _CALCULATION.sub("", reasoning).strip()
        return question, answer, f"{trace}\n\\boxed{{{answer}}}", trace or None


class MATH(_WordProblems):
    """Competition mathematics with LaTeX answers.

    Rows have ``problem`` and either ``answer``, or ``solution`` whose last box is the answer, or both. The completion
    to imitate is the solution, or the boxed answer where there is none.

    Source: Hendrycks et al. 2021, arXiv:2103.03874.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_WordProblems.Config):
        """Options."""

        hub: str = "EleutherAI/hendrycks_math"

    name = "math"

    def _read(self, row: dict[str, Any], where: str) -> tuple[str, str, str, str | None]:
        question = field(row, "problem", where)
        solution = field(row, "solution", where) if "solution" in row else None
        if "answer" in row:
            answer: str | None = field(row, "answer", where)
        elif solution is not None:
            answer = _last_boxed(solution)
        else:
            raise UserError(f"{where}: neither 'answer' nor 'solution'; the row has {', '.join(row)}")
        if not answer:
            raise UserError(f"{where}: column 'solution' has no \\boxed{{}} answer: {str(solution)[-40:]!r}")
        before = solution[: max(solution.rfind("\\boxed"), solution.rfind("\\fbox"), 0)].rstrip() if solution else ""
        return question, answer.strip(), solution or f"\\boxed{{{answer.strip()}}}", before or None


def _last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` or ``\fbox{...}`` of a reference solution; braces nest."""
    content = None
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[match.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)  # \{ and \} print braces, they do not group
            if depth == 0:
                content = text[match.end() : match.end() + brace.start()]
                break
    return content
