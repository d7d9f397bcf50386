"""Workers in this process: a call has finished when submit returns."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Concatenate

from typing_extensions import override

from dllm_rl.cluster.group import Heartbeat, P, R, W, WorkerGroup, WorkerRank
from dllm_rl.cluster.usage import Usage


class LocalWorkerGroup(WorkerGroup[W]):
    """One process, no copies: workers may share objects with each other and with the driver."""

    def __init__(self, name: str, build: Callable[[WorkerRank], W], size: int = 1) -> None:
        """Build the workers.

        Args:
            name: for messages.
            build: makes the worker of a rank.
            size: number of workers.
        """
        self.name, self.size, self._build = name, size, build
        self._key = secrets.token_hex(16)  # of a collective group, which has one rank here
        self._workers = [build(WorkerRank(rank=rank, size=size, key=self._key)) for rank in range(size)]
        self._usage = Usage()

    @override
    def submit(
        self, rank: int, method: Callable[Concatenate[W, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(getattr(self._workers[rank], method.__name__)(*args, **kwargs))
        except Exception as error:  # the caller's, at result()
            future.set_exception(error)
        return future

    @override
    def heartbeat(self, rank: int) -> Future[Heartbeat]:
        future: Future[Heartbeat] = Future()
        future.set_result(self._usage.heartbeat(getattr(self._workers[rank], "ticks", 0)))
        return future

    @override
    def restart(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self._end(self._workers[rank])
            self._workers[rank] = self._build(WorkerRank(rank=rank, size=self.size, key=self._key))

    @override
    def end(self, rank: int) -> None:
        """A worker of this process cannot hang while the driver looks at it."""

    @override
    def close(self) -> None:
        for worker in self._workers:
            self._end(worker)
        self._workers = []

    def _end(self, worker: W) -> None:
        close = getattr(worker, "close", None)
        if close is not None:
            close()
