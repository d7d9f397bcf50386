"""Text between tags, in one pass: a lazy regular expression reads to the end again for every unclosed tag."""

from __future__ import annotations

OPEN, CLOSE = "<answer>", "</answer>"


def last_answer(text: str) -> str | None:
    """What stands in the last ``<answer>...</answer>``, or None; a tag closes the first one that is open."""
    found, end = None, 0
    while (begin := text.find(OPEN, end)) >= 0 and (end := text.find(CLOSE, begin)) >= 0:
        found = text[begin + len(OPEN) : end]
        end += len(CLOSE)
    return found
