"""Looks after members that have work: who makes no progress for too long is ended."""

from __future__ import annotations

import time
from collections.abc import Iterable

from dllm_rl.cluster.group import Group, Lost

HEARTBEAT_S = 5.0


class Watch:
    """Remembers when each member last made progress."""

    def __init__(self, group: Group, hang_s: float) -> None:
        """Start watching.

        Args:
            group: the members.
            hang_s: how long a member may stand still while it has work.
        """
        self._group, self._hang_s = group, hang_s
        self._seen: dict[int, tuple[int, float]] = {}

    def begin(self, rank: int) -> None:
        """A member was given work."""
        self._seen.pop(rank, None)

    def look(self, busy: Iterable[int]) -> None:
        """End members that stand still; their calls then raise Lost."""
        for rank in busy:
            try:
                ticks = self._group.pulse(rank).result(HEARTBEAT_S).ticks
            except (TimeoutError, Lost):
                ticks = -1  # silent: as good as standing still
            now = time.monotonic()
            before, since = self._seen.get(rank, (None, now))
            if ticks != before:
                self._seen[rank] = (ticks, now)
            elif now - since > self._hang_s:
                self._group.end(rank)
