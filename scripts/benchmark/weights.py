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
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import ray
import torch
from torch import nn
from typing_extensions import override

from dllm_rl.cluster.group import WorkerRank
from dllm_rl.cluster.placement import Placement, ResourceRequest
from dllm_rl.cluster.ray_group import RayWorkerGroup
from dllm_rl.driver.engine_pool import EnginePool
from dllm_rl.driver.learner_group import LearnerGroup
from dllm_rl.driver.weight_sync import DistributedWeightSync
from dllm_rl.models.digest import tensor_digests
from dllm_rl.protocols.engine import RolloutEngine, TensorSpec
from dllm_rl.workers.engine_worker import EngineWorker
from dllm_rl.workers.learner_worker import LearnerWorker

ROWS = 1 << 10


class Weights:
    """A learner with nothing but weights: as much of one as LearnerWorker looks at when it pushes."""

    step = 0

    def __init__(self, mb: int) -> None:
        count = max(1, (mb << 20) // (4 * ROWS * ROWS))
        self._named = [(f"layer{number}", nn.Parameter(torch.randn(ROWS, ROWS))) for number in range(count)]

    def named_weights(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Parameters by name."""
        return iter(self._named)


class Store(RolloutEngine):
    """An engine with nothing but weights."""

    def __init__(self, mb: int) -> None:
        count = max(1, (mb << 20) // (4 * ROWS * ROWS))
        self._values = {f"layer{number}": torch.zeros(ROWS, ROWS) for number in range(count)}

    @override
    def heartbeat(self) -> int:
        return 0

    @override
    def begin_weights(self, tensors: Sequence[TensorSpec]) -> None:
        assert {spec.name for spec in tensors} == self._values.keys()

    @override
    def write_weights(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._values[name].copy_(value)

    @override
    def commit_weights(self) -> Mapping[str, int]:
        return tensor_digests(self._values.items())


def sender(mb: int, rank: WorkerRank) -> LearnerWorker:
    """What a learner's actor builds."""
    nothing: Any = SimpleNamespace(device=torch.device("cpu"), adapter=None)
    weights: Any = Weights(mb)
    return LearnerWorker(weights, rank, nothing)


def receiver(mb: int, rank: WorkerRank) -> EngineWorker:
    """What an engine's actor builds."""
    return EngineWorker(Store(mb), rank, packed=True)


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
    senders: RayWorkerGroup[LearnerWorker] = RayWorkerGroup(
        "learner", functools.partial(sender, arguments.mb), placement.learners, environment
    )
    receivers: RayWorkerGroup[EngineWorker] = RayWorkerGroup(
        "engine", functools.partial(receiver, arguments.mb), placement.engines, environment
    )
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
            transport=transport,
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
