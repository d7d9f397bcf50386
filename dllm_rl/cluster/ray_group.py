"""Members in Ray actors, one each, at fixed places of a placement group."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, InvalidStateError, wait
from typing import Any, Concatenate

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from typing_extensions import override

from dllm_rl.cluster.group import Heartbeat, P, R, W, WorkerGroup, WorkerLost, WorkerRank, gather
from dllm_rl.cluster.liveness import ClusterWatch
from dllm_rl.cluster.placement import Slot
from dllm_rl.cluster.usage import Usage

CLOSE_S = 2.0  # a worker that is busy will not answer, and must not delay the end of a run
START_UP_S = 600.0  # importing torch and loading a large model from a slow disk
_LATE = f"it did not come up within {START_UP_S:g} s; is there still room for it?"


class WorkerActor:
    """What runs in an actor: it builds the worker and passes calls on."""

    def __init__(self) -> None:
        self._worker: Any = None
        self._usage = Usage()

    def rendezvous(self) -> tuple[str, int, str]:
        """(address, free port there, fresh key) for the group."""
        address = ray.util.get_node_ip_address()
        with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            return address, probe.getsockname()[1], secrets.token_hex(16)

    def build(self, make: Callable[[WorkerRank], Any], rank: WorkerRank) -> None:
        """Make the worker."""
        self._worker = make(dataclasses.replace(rank, host=ray.util.get_node_ip_address()))

    def invoke(self, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a method of the worker."""
        with self._usage.working():
            return getattr(self._worker, method)(*args, **kwargs)

    @ray.method(concurrency_group="control")
    def heartbeat(self) -> Heartbeat:
        """A sign of life; answered beside a call that is under way."""
        return self._usage.heartbeat(getattr(self._worker, "ticks", 0))


class RayWorkerGroup(WorkerGroup[W]):
    """Actors that the driver owns: they end with it."""

    def __init__(
        self,
        name: str,
        build: Callable[[WorkerRank], W],
        slots: Sequence[Slot],
        env: Mapping[str, str],
        watch: ClusterWatch | None = None,
    ) -> None:
        """Take note of what to start; restart() starts it.

        Args:
            name: for messages.
            build: picklable; makes a worker for its place.
            slots: where each worker runs and what it gets.
            env: environment variables of the actors.
            watch: ends calls when the cluster is gone.
        """
        self._watch = watch
        self.name, self.size = name, len(slots)
        self._build, self._slots, self._env = build, list(slots), dict(env)
        self._actors: list[Any] = [None] * self.size
        self._why: dict[int, str] = {}
        self._rendezvous = ("127.0.0.1", 0, "")

    @override
    def submit(
        self, rank: int, method: Callable[Concatenate[W, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Future[R]:
        actor = self._actors[rank]
        if actor is None:
            return self._gone(rank)
        return self._future(rank, actor.invoke.remote(method.__name__, args, kwargs))

    @override
    def heartbeat(self, rank: int) -> Future[Heartbeat]:
        actor = self._actors[rank]
        return self._gone(rank) if actor is None else self._future(rank, actor.heartbeat.remote())

    @override
    def restart(self, ranks: Sequence[int]) -> None:
        # The address of rank 0 comes first: workers of a collective group need it in order to meet.
        for rank in ranks:
            self._kill(rank)
            self._why.pop(rank, None)
            self._actors[rank] = self._start(self._slots[rank])
        if 0 in ranks:
            asked = self._future(0, self._actors[0].rendezvous.remote())
            if wait([asked], timeout=START_UP_S).not_done:
                raise WorkerLost(self.name, 0, _LATE)
            self._rendezvous = asked.result()
        address, port, key = self._rendezvous
        wanted = [WorkerRank(rank=rank, size=self.size, address=address, port=port, key=key) for rank in ranks]
        builds = {
            self._future(one.rank, self._actors[one.rank].build.remote(self._build, one)): one.rank for one in wanted
        }
        late = wait(builds, timeout=START_UP_S, return_when=FIRST_EXCEPTION).not_done
        if late and not any(future.done() and future.exception() for future in builds):
            raise WorkerLost(self.name, min(builds[future] for future in late), _LATE)
        gather([future for future in builds if future.done()])

    @override
    def end(self, rank: int) -> None:
        self._why[rank] = "ended by the driver because it made no progress"
        self._kill(rank)

    @override
    def close(self) -> None:
        # A killed actor leaves behind what it has started itself (an engine's server, say): ask first.
        with contextlib.suppress(Exception):  # the cluster may go meanwhile
            if self._watch is not None and self._watch.lost:
                return  # nobody is left to be asked, and its calls could wait for ever
            wait([a.invoke.remote("close", (), {}).future() for a in self._actors if a is not None], timeout=CLOSE_S)
        for rank in range(self.size):
            self._kill(rank)

    def pids(self) -> list[int]:
        """Process of each worker."""
        return [self.heartbeat(rank).result(START_UP_S).pid for rank in range(self.size)]

    def _start(self, slot: Slot) -> Any:
        place = PlacementGroupSchedulingStrategy(
            slot.placement, placement_group_bundle_index=slot.bundle, placement_group_capture_child_tasks=False
        )
        actor: Any = ray.remote(concurrency_groups={"control": 1})
        return (
            actor(WorkerActor)
            .options(
                num_cpus=slot.cpus,
                num_gpus=slot.gpus,
                scheduling_strategy=place,
                max_restarts=0,  # a new process needs weights before it gets work: that is the driver's to do
                runtime_env={"env_vars": self._env},
            )
            .remote()
        )

    def _kill(self, rank: int) -> None:
        actor, self._actors[rank] = self._actors[rank], None
        if actor is not None:
            with contextlib.suppress(Exception):  # it may be gone already
                ray.kill(actor, no_restart=True)

    def _gone(self, rank: int) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(WorkerLost(self.name, rank, self._why.get(rank, "it was ended")))
        return future

    def _future(self, rank: int, reference: Any) -> Future[Any]:
        """Of a call; what the worker raised comes out as it was, an actor's death as WorkerLost."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def hand_over(done: Future[Any]) -> None:
            error = done.exception()
            with contextlib.suppress(InvalidStateError):  # the watch was faster
                if error is None:
                    future.set_result(done.result())
                else:
                    future.set_exception(self._translated(rank, error))

        if self._watch is not None:
            self._watch.follow(future)
        reference.future().add_done_callback(hand_over)
        return future

    def _translated(self, rank: int, error: BaseException) -> BaseException:
        if isinstance(error, ray.exceptions.RayTaskError):
            cause: BaseException | None = error.cause
            if cause is None:
                return error
            cause.__cause__ = error  # its text holds the traceback of the actor
            return cause
        if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.ActorUnavailableError):
            return WorkerLost(self.name, rank, self._why.get(rank, _brief(error)))
        return error


def _brief(error: BaseException) -> str:
    """Ray's own words without its guesses and numbers; the process number helps to find its log."""
    text = " ".join(str(error).split())
    process = re.search(r"\bpid: (\d+)", text)
    first = re.split(r"\.(?: |$)| class_name:", text)[0]
    return first[:200] + (f" (process {process[1]})" if process else "")
