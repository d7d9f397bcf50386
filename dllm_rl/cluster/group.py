"""Members that do one job, in this process or each in a Ray actor: one interface, and the driver does not know which.

A worker is any object; its public methods are called by name. Futures are the standard library's, so that waiting for
any of several workers, with a deadline, is concurrent.futures.wait.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from dllm_rl.errors import RunStopped


class WorkerLost(RunStopped):
    """A worker has died or was ended because it hung.

    Attributes:
        group: name of its group.
        rank: its number.
        reason: what is known about the end.
    """

    def __init__(self, group: str, rank: int, reason: str) -> None:
        super().__init__(f"{group} {rank} is lost: {reason}")
        self.group, self.rank, self.reason = group, rank, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkerLost, (self.group, self.rank, self.reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRank:
    """Where a worker stands in its group.

    Attributes:
        rank: number of the worker.
        size: workers of the group.
        address: host where rank 0 can be reached.
        host: where this worker can be reached.
        port: free port at rank 0's address, for a rendezvous.
        key: of the rendezvous, known to the group alone.
    """

    rank: int = 0
    size: int = 1
    address: str = "127.0.0.1"
    host: str = "127.0.0.1"
    port: int = 0
    key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A sign of life.

    Attributes:
        ticks: grows while the worker works (forwards, micro-batches); a worker that hangs stands still.
        pid: process.
        host: node.
        rss_bytes: resident memory.
        cpu_s: processor time since the process started.
        busy_s: time that it has spent in calls.
        gpu_bytes: memory allocated on its accelerator, 0 without one.
        gpu_percent: how busy that is; None without one, or if it cannot be asked.
    """

    ticks: int
    pid: int
    host: str
    rss_bytes: int
    cpu_s: float
    busy_s: float
    gpu_bytes: int
    gpu_percent: float | None = None


W = TypeVar("W")  # the workers' class
P = ParamSpec("P")
R = TypeVar("R")


class WorkerGroup(ABC, Generic[W]):
    """Members 0 .. size - 1.

    Attributes:
        name: what its workers are called in messages, e.g. "engine".
        size: number of workers.
    """

    name: str
    size: int

    @abstractmethod
    def submit(
        self, rank: int, method: Callable[Concatenate[W, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Future[R]:
        """Call a method of one worker. The future raises what the worker raised, or WorkerLost."""

    @abstractmethod
    def heartbeat(self, rank: int) -> Future[Heartbeat]:
        """A sign of life, also while a call is under way."""

    @abstractmethod
    def restart(self, ranks: Sequence[int]) -> None:
        """End these workers and build them anew, together (a rendezvous needs all of them).

        Raises:
            WorkerLost: one of them did not come up.
        """

    @abstractmethod
    def end(self, rank: int) -> None:
        """End a worker that hangs; calls under way raise WorkerLost."""

    @abstractmethod
    def close(self) -> None:
        """End all workers."""

    def calls(
        self, ranks: Iterable[int], method: Callable[Concatenate[W, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> dict[str, Future[R]]:
        """Call a method of some workers at once with the same arguments; the calls by the name of the worker."""
        return {f"{self.name} {rank}": self.submit(rank, method, *args, **kwargs) for rank in ranks}

    def call(self, method: Callable[Concatenate[W, P], R], /, *args: P.args, **kwargs: P.kwargs) -> list[R]:
        """Call a method of all workers at once with the same arguments; results by rank."""
        return gather([self.submit(rank, method, *args, **kwargs) for rank in range(self.size)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def gather(futures: Sequence[Future[R]]) -> list[R]:
    """Results in order; raises the first failure that is not merely a consequence (WorkerLost) of another."""
    failures = [error for future in futures if (error := future.exception()) is not None]
    if failures:
        raise next((error for error in failures if not isinstance(error, WorkerLost)), failures[0])
    return [future.result() for future in futures]
