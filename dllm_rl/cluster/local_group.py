"""Members in this process: a call has finished when submit returns."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from dllm_rl.cluster.group import Build, Heartbeat, WorkerGroup, WorkerRank
from dllm_rl.cluster.usage import Usage


class LocalWorkerGroup(WorkerGroup):
    """One process, no copies: workers may share objects with each other and with the driver."""

    def __init__(self, name: str, build: Build, size: int = 1) -> None:
        """Build the workers.

        Args:
            name: for messages.
            build: makes a worker for its place.
            size: number of workers.
        """
        self.name, self.size, self._build = name, size, build
        self._workers = [build(WorkerRank(rank=rank, size=size)) for rank in range(size)]
        self._usage = Usage()

    def submit(self, rank: int, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call at once; see WorkerGroup."""
        future: Future[Any] = Future()
        try:
            future.set_result(getattr(self._workers[rank], method)(*args, **kwargs))
        except Exception as error:  # the caller's, at result()
            future.set_exception(error)
        return future

    def heartbeat(self, rank: int) -> Future[Heartbeat]:
        """See WorkerGroup."""
        future: Future[Heartbeat] = Future()
        future.set_result(self._usage.heartbeat(getattr(self._workers[rank], "ticks", 0)))
        return future

    def restart(self, ranks: Sequence[int]) -> None:
        """See WorkerGroup."""
        for rank in ranks:
            self._workers[rank] = self._build(WorkerRank(rank=rank, size=self.size))

    def end(self, rank: int) -> None:
        """A worker of this process cannot hang while the driver looks at it."""

    def close(self) -> None:
        """Drop the workers."""
        self._workers = []
