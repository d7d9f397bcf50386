"""What long phases report to: nothing, or a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")
Advance = Callable[[int, str], None]  # (how many units are done since the last call, a short note to show)


class Progress(Protocol):
    """Shows phases that take long."""

    def track(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """A phase of total units; the context gives the function to call as units finish."""

    def log(self, text: str) -> None:
        """One line for the user."""


def each(progress: Progress, label: str, items: Sequence[T]) -> Iterator[T]:
    """The items, one unit of a phase each."""
    with progress.track(label, len(items)) as advance:
        for item in items:
            yield item
            advance(1, "")


class Quiet:
    """Shows nothing."""

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:
        """A phase nobody sees."""
        yield lambda done, note: None

    def log(self, text: str) -> None:
        """Say nothing."""
