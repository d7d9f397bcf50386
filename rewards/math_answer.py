"""Whether the final answer equals the reference, by math-verify.

math-verify guards itself with signal.alarm, so it must run in a process' main thread (reward workers do), and its
comparison is not symmetric: the reference comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rewards import Verdict


class MathAnswer:
    """1 if the last boxed expression (or, without one, the last expression) equals the answer, else 0."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        require_boxed: bool = True  # a completion without a boxed answer is invalid

    def __init__(self, config: Config) -> None:
        # Imported when a worker builds the verifier: sympy takes a second that other rewards need not wait for.
        import math_verify

        self._config, self._library = config, math_verify

    def __call__(
        self, prompts: list[Any], completions: list[str], *, answer: list[str], **columns: list[Any]
    ) -> list[Verdict]:
        """One verdict per completion; "invalid" if no answer could be found in it.

        Raises:
            ValueError: a reference answer that cannot be parsed: the row cannot be judged.
        """
        return [self._judge(*row) for row in zip(completions, answer, strict=True)]

    def _judge(self, completion: str, answer: str) -> Verdict:
        gold = self._library.parse(f"\\boxed{{{answer}}}")
        if not gold:
            raise ValueError(f"the reference answer {answer!r} cannot be parsed")
        boxed = last_boxed(completion)
        if boxed is None and self._config.require_boxed:
            return Verdict(0.0, "invalid")
        # Only the last box: math-verify would merge several into a set.
        guess = self._library.parse(completion if boxed is None else f"\\boxed{{{boxed}}}")
        if not guess:
            return Verdict(0.0, "invalid")
        return Verdict(float(self._library.verify(gold, guess)))


def last_boxed(text: str) -> str | None:
    """Content of the last balanced ``\\boxed{...}``, or None."""
    start = text.rfind("\\boxed")
    while start >= 0:
        opening = start + len("\\boxed")
        while opening < len(text) and text[opening] == " ":
            opening += 1
        depth = 0
        for end in range(opening, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth <= 0:
                break
        if opening < len(text) and text[opening] == "{" and depth == 0:
            return text[opening + 1 : end]
        start = text.rfind("\\boxed", 0, start)
    return None
