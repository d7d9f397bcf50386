"""A row of the tables of docs/reliability.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A fault, and how often it was survived.

    Attributes:
        fault: what was done, in the words of the table.
        tried: how often.
        survived: how often the run went on, resumed to the same bits or was refused in one line.
        seen: what a user sees, in a few words.
    """

    fault: str
    tried: int
    survived: int
    seen: str
