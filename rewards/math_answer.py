"""Whether the final answer equals the reference, by math-verify.

math-verify's own timeouts turn a comparison that it could not finish into "not equal"; they are off here, and the
reward pool's deadline marks such a row as failed. Its comparison is not symmetric: the reference comes first.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from dllm_rl.errors import UserError
from rewards import Verdict

MAX_CHARACTERS = 1000  # of an answer; the longest reference answer of MATH has about 160


class MathAnswer:
    """1 if the last boxed expression (or, if none is required, the last expression) equals the answer, else 0."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        require_boxed: bool = True  # a completion without a boxed answer is invalid

    def __init__(self, config: Config) -> None:
        # Imported when a worker builds the verifier: sympy takes a second that other rewards need not wait for.
        import math_verify

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns in every call that its timeouts are off
        self._config, self._library = config, math_verify

    def __call__(
        self, prompts: list[Any], completions: list[str], *, answer: list[str], **columns: list[Any]
    ) -> list[Verdict]:
        """One verdict per completion; "invalid" if no answer could be found in it.

        Raises:
            UserError: a row without a reference answer: it cannot be scored.
        """
        return [self._score(*row) for row in zip(completions, answer, strict=True)]

    def _score(self, completion: str, answer: str) -> Verdict:
        if not answer.strip():
            raise UserError("the row has no reference answer")
        boxed = last_boxed(completion)
        if boxed is None and self._config.require_boxed:
            return Verdict(0.0, "invalid")
        guess = completion.strip()[-MAX_CHARACTERS:] if boxed is None else boxed.strip()
        if not guess or len(guess) > MAX_CHARACTERS:
            return Verdict(0.0, "invalid")
        if "".join(guess.split()) == "".join(answer.split()):
            return Verdict(1.0)  # also for references that math-verify cannot read
        expression = self._parse(guess if boxed is None else f"\\boxed{{{guess}}}")
        if not expression:
            return Verdict(0.0, "invalid")
        # Only the last box was parsed: math-verify would merge several into a set.
        equal = self._library.verify(self._parse(f"\\boxed{{{answer}}}"), expression, timeout_seconds=None)
        return Verdict(float(equal))

    def _parse(self, text: str) -> list[Any]:
        parsed: list[Any] = self._library.parse(text, parsing_timeout=None)
        return parsed


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` whose braces balance, or None."""
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))[-20:]):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[match.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)  # \{ and \} print braces, they do not group
            if depth == 0:
                return text[match.end() : match.end() + brace.start()]
    return None
