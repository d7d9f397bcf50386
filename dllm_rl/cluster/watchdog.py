"""Looks after workers that have work: who makes no progress for too long is ended."""

from __future__ import annotations

import time
from collections.abc import Iterable

from dllm_rl.cluster.group import WorkerGroup, WorkerLost

HEARTBEAT_S = 5.0  # between two looks; a process that answers none for hang_s is ended, though its connection is open


class Watchdog:
    """Remembers when each worker last made progress."""

    def __init__(self, group: WorkerGroup, hang_s: float) -> None:
        """Start watching.

        Args:
            group: the workers.
            hang_s: how long a worker may stand still while it has work.
        """
        self._group, self._hang_s = group, hang_s
        self._seen: dict[int, tuple[int, float]] = {}

    def begin(self, rank: int) -> None:
        """A worker was given work."""
        self._seen.pop(rank, None)

    def look(self, busy: Iterable[int]) -> None:
        """End workers that stand still; their calls then raise WorkerLost."""
        for rank in busy:
            try:
                ticks = self._group.heartbeat(rank).result(HEARTBEAT_S).ticks
            except (TimeoutError, WorkerLost):
                ticks = -1  # silent: as good as standing still
            now = time.monotonic()
            before, since = self._seen.get(rank, (None, now))
            if ticks != before:
                self._seen[rank] = (ticks, now)
            elif now - since > self._hang_s:
                self._group.end(rank)
