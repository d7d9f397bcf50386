"""Verifiers, one file each. Importing this package must stay cheap (no torch): reward workers start with it."""

from __future__ import annotations

from typing import Literal

OWNER = "dllm-rl"


class Verdict(float):
    """A reward value with a status: a float, so that TRL accepts it too.

    Attributes:
        status: "ok" (scored) or "invalid" (the completion is malformed; the value still counts).
    """

    status: Literal["ok", "invalid"]

    def __new__(cls, value: float, status: Literal["ok", "invalid"] = "ok") -> Verdict:
        """A verdict of this value."""
        verdict = super().__new__(cls, value)
        verdict.status = status
        return verdict

    def __reduce__(self) -> tuple[type[Verdict], tuple[float, str]]:
        return Verdict, (float(self), self.status)


OPEN, CLOSE = "<answer>", "</answer>"


def last_answer(text: str) -> str | None:
    """What stands in the last ``<answer>...</answer>``, or None; a tag closes the first one that is open."""
    found, end = None, 0
    while (begin := text.find(OPEN, end)) >= 0 and (end := text.find(CLOSE, begin)) >= 0:
        found = text[begin + len(OPEN) : end]
        end += len(CLOSE)
    return found
