"""Members in this process: a call has finished when submit returns."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from dllm_rl.cluster.group import Build, Group, Place, Pulse
from dllm_rl.cluster.usage import Usage


class LocalGroup(Group):
    """One process, no copies: members may share objects with each other and with the driver."""

    def __init__(self, name: str, build: Build, size: int = 1) -> None:
        """Build the members.

        Args:
            name: for messages.
            build: makes a member for its place.
            size: number of members.
        """
        self.name, self.size, self._build = name, size, build
        self._members = [build(Place(rank=rank, size=size)) for rank in range(size)]
        self._usage = Usage()

    def submit(self, rank: int, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call at once; see Group."""
        future: Future[Any] = Future()
        try:
            future.set_result(getattr(self._members[rank], method)(*args, **kwargs))
        except Exception as error:  # the caller's, at result()
            future.set_exception(error)
        return future

    def pulse(self, rank: int) -> Future[Pulse]:
        """See Group."""
        future: Future[Pulse] = Future()
        future.set_result(self._usage.pulse(getattr(self._members[rank], "ticks", 0)))
        return future

    def restart(self, ranks: Sequence[int]) -> None:
        """See Group."""
        for rank in ranks:
            self._members[rank] = self._build(Place(rank=rank, size=self.size))

    def end(self, rank: int) -> None:
        """A member of this process cannot hang while the driver looks at it."""

    def close(self) -> None:
        """Drop the members."""
        self._members = []
