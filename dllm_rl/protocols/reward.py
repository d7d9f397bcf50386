"""The contract of reward functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Reward(Protocol):
    """A verifier, called with one completion at a time, as text.

    A plain function (or any object that is not a class with a Config) works too, called as TRL calls its reward
    functions: by keyword, with all the completions of a prompt, as messages where the prompt is a conversation, and
    with ``completion_ids`` and ``trainer_state``; it may be async. The deadline of such a call is timeout_s times its
    rows; if it is missed, or the call raises, the call is made again with each half of its rows.

    Columns travel as JSON: tuples and arrays arrive as lists, dates as ISO 8601 text, keys of mappings as text.
    Returns one value per completion; None = not applicable; a rewards.Verdict carries a status besides its value.
    The reward self-test before training scores a right and a wrong completion of a few examples. It asks for at least 1
    and for less if the reward compares with the right answer: if it takes an argument ``answer``, or has an attribute
    ``gold = True`` (of the class, or the function; False: never). Of other rewards it asks for values only.

    Raising, or running past the deadline, marks the row as failed: it is excluded from its group, never scored 0.
    """

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> Sequence[float | None]:
        """Score completions; columns hold one list per dataset column, aligned with completions."""
