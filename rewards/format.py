r"""Whether a completion has the shape that the prompt asked for.

Released rewards of the d1 family matched with ``re.match`` without DOTALL, so that reasoning of more than one line
never earned its format reward, and spelled ``"\boxed"`` without escaping the backslash; both are tested here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from dllm_rl.errors import UserError
from rewards import last_answer
from rewards.math_answer import last_boxed

_INSIDE = r"(?:(?!</?(?:reasoning|answer)>).)*"  # anything but another tag, so that each tag occurs once
_PRESETS = {
    "answer": r"<answer>.*?</answer>",
    "reasoning_answer": rf"\A\s*<reasoning>{_INSIDE}</reasoning>\s*<answer>{_INSIDE}</answer>\s*\Z",
}


class Format:
    """1 if the pattern is found, else 0."""

    gold = True  # a right answer has the form

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        pattern: str = "boxed"  # "boxed", "answer", "reasoning_answer", or a regular expression (searched, DOTALL)

        def __post_init__(self) -> None:
            try:
                re.compile(_PRESETS.get(self.pattern, self.pattern))
            except re.error as error:
                raise UserError(f"pattern = {self.pattern!r}: not a regular expression ({error})") from None

    def __init__(self, config: Config) -> None:
        # Balanced braces are beyond a regular expression; tags that are not closed take it quadratic time.
        self._find = {"boxed": last_boxed, "answer": last_answer}.get(config.pattern)
        self._pattern = re.compile(_PRESETS.get(config.pattern, config.pattern), re.DOTALL)

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float]:
        """One value per completion."""
        if self._find is not None:
            return [float(self._find(text) is not None) for text in completions]
        return [float(self._pattern.search(text) is not None) for text in completions]
