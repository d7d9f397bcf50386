"""How fast weights reach engines, by transport: MB/s over all engines, digests and control calls included.

    python scripts/benchmark/weights.py --mb 400 --engines 2

Real Ray actors on this machine: one sender, the engines, and the sync of a run between them. Each figure is the median
of some pushes after one that does not count. Memory is what sender and engines grew by at their peak, in buckets.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import ray
import torch
from torch import nn

from dllm_rl.cluster.group import WorkerRank
from dllm_rl.cluster.placement import Placement, ResourceRequest
from dllm_rl.cluster.ray_group import RayWorkerGroup
from dllm_rl.driver.engine_pool import EnginePool
from dllm_rl.driver.learner_group import LearnerGroup
from dllm_rl.driver.weight_sync import DistributedWeightSync
from dllm_rl.weight_transfer.broadcast import Broadcast
from dllm_rl.weight_transfer.receiver import WeightReceiver, size_of
from dllm_rl.weight_transfer.sender import OutgoingTensor, WeightSender, received

ROWS = 1 << 10


class Sender:
    """A learner with nothing but weights."""

    ticks = 0

    def __init__(self, mb: int, place: WorkerRank) -> None:
        count = max(1, (mb << 20) // (4 * ROWS * ROWS))
        weights = {f"layer{number}": nn.Parameter(torch.randn(ROWS, ROWS)) for number in range(count)}
        outgoing = [
            OutgoingTensor(name, [value], functools.partial(lambda v: v, value)) for name, value in weights.items()
        ]
        self._sender = WeightSender(outgoing, _whole, leader=True, host=place.host)
        self.open, self.join, self.send, self.finish = (
            getattr(self._sender, name) for name in ("open", "join", "send", "finish")
        )

    def entries(self) -> Any:
        """See WeightSender."""
        return self._sender.entries


class Receiver:
    """An engine with nothing but weights."""

    ticks = 0

    def __init__(self, mb: int, place: WorkerRank) -> None:
        count = max(1, (mb << 20) // (4 * ROWS * ROWS))
        self._place = place
        self._receiver = WeightReceiver(
            {f"layer{number}": torch.zeros(ROWS, ROWS) for number in range(count)}, "engine"
        )
        self._layout: Any = ()
        self._device = torch.device("cpu")

    def join(self, address: Any, size: int, timeout_s: float) -> None:
        """See EngineWorker."""
        place = self._place
        self._broadcast = Broadcast(
            address, rank=place.rank + 1, size=size, host=place.host, device=self._device, timeout_s=timeout_s
        )

    def begin(self, step: int, layout: Any, *, allow_older: bool) -> None:
        """See EngineWorker."""
        self._receiver.begin(step, layout, allow_older=allow_older)
        self._layout = layout

    def write(self, number: int, payload: Any) -> None:
        """See EngineWorker."""
        if payload is None:
            buffer = torch.empty(size_of(self._layout[number]), dtype=torch.uint8)
            self._broadcast(buffer)
        else:
            buffer = received(payload, self._device)
        self._receiver.write(number, buffer)

    def commit(self, step: int) -> dict[str, int]:
        """See EngineWorker."""
        return self._receiver.commit(step)

    def activate(self, version: Any) -> None:
        """See EngineWorker."""
        self._receiver.accept()


def _whole(parameters: Any) -> Any:
    import contextlib

    return contextlib.nullcontext()


class Peak:
    """The most memory that processes have used at once, beyond what they had before."""

    def __init__(self, pids: list[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._before = [self._private(process) for process in self._processes]
        self._most, self._done = [0.0] * len(pids), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @staticmethod
    def _private(process: psutil.Process) -> int:
        info = process.memory_info()
        return int(info.rss - info.shared)  # Ray's store is shared memory

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            for place, process in enumerate(self._processes):
                grown = self._private(process) - self._before[place]
                self._most[place] = max(self._most[place], grown / (1 << 20))

    def __enter__(self) -> list[float]:
        self._thread.start()
        return self._most

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def main() -> None:
    """Print a line per transport."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mb", type=int, default=400, help="size of the model, MB")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=1 + arguments.engines, include_dashboard=False, log_to_driver=False)
    placement = Placement.reserve(
        ResourceRequest(count=arguments.engines, cpus=1, gpus=0),
        ResourceRequest(count=1, cpus=1, gpus=0),
        colocate=False,
        wait_s=60,
        log=print,
    )
    environment = {"OMP_NUM_THREADS": "1"}
    senders = RayWorkerGroup("learner", functools.partial(Sender, arguments.mb), placement.learners, environment)
    receivers = RayWorkerGroup("engine", functools.partial(Receiver, arguments.mb), placement.engines, environment)
    with ThreadPoolExecutor(2) as both:
        for started in [both.submit(group.restart, range(group.size)) for group in (senders, receivers)]:
            started.result()
    learner = LearnerGroup(senders, hang_s=60, max_restarts=0)
    pool = EnginePool(receivers, rows_per_call=1, hang_s=60, max_restarts=0, log=print)
    print(f"{arguments.mb} MB to {arguments.engines} engines, buckets of {arguments.bucket_mb} MB")
    for transport in ("broadcast", "object_store"):
        sync = DistributedWeightSync(
            learner,
            pool,
            transport=transport,  # type: ignore[arg-type]
            bucket_bytes=arguments.bucket_mb << 20,
            timeout_s=120,
            log=print,
        )
        sync.push()
        seconds = []
        with Peak(senders.pids() + receivers.pids()) as grown:
            for _ in range(arguments.repeat):
                sync.push()
                seconds.append(sync.seconds)
        rate = arguments.engines * sync.bytes_sent / (1 << 20) / statistics.median(seconds)
        overhead = ", ".join(f"{most / arguments.bucket_mb:.1f}" for most in grown)
        print(
            f"{transport:13} {rate:7.0f} MB/s over all engines  ({statistics.median(seconds):.2f} s per push, "
            f"{min(seconds):.2f} to {max(seconds):.2f})  memory beyond the weights, in buckets: {overhead}"
        )
    senders.close()
    receivers.close()
    placement.close()
    ray.shutdown()


if __name__ == "__main__":
    main()
