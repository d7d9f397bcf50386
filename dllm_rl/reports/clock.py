"""Wall time of the phases of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Clock:
    """Wall time per phase, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase; several uses add up."""
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def add(self, other: Clock) -> None:
        """Add another clock's phases to this one's."""
        for phase, seconds in other.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class Due:
    """When something is due again: after every so many steps, or so many minutes after the last time.

    A context manager around each time.
    """

    def __init__(self, every_steps: int | None, every_minutes: float | None) -> None:
        self._steps, self._minutes, self._last = every_steps, every_minutes, time.monotonic()

    def at(self, step: int) -> bool:
        """Whether it is due after this step."""
        late = self._minutes is not None and time.monotonic() - self._last >= 60 * self._minutes
        return late or (self._steps is not None and step % self._steps == 0)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self._last = time.monotonic()
