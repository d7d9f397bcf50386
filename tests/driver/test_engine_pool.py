"""Calls are dealt out, and what a dead engine had is done by others; on threads that can die, without Ray."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from dllm_rl.cluster.group import Heartbeat, WorkerGroup, WorkerLost
from dllm_rl.driver.engine_pool import EnginePool
from dllm_rl.reports.clock import Clock

HEARTBEAT = Heartbeat(ticks=0, pid=0, host="", rss_bytes=0, cpu_s=0, busy_s=0, gpu_bytes=0)


class Threads(WorkerGroup):
    """A group whose workers die when they are asked for certain prompts, each time once, and in some methods."""

    name = "engine"

    def __init__(self, size, deaths=(), dies_in=()):
        self.size, self.deaths, self.dies_in = size, list(deaths), list(dies_in)
        self.workers = [ThreadPoolExecutor(1) for _ in range(size)]
        self.dead, self.held, self.most, self.log = [False] * size, [0] * size, 0, []
        self.lock = threading.Lock()

    def submit(self, rank, method, *args, **kwargs) -> Future:
        with self.lock:
            self.held[rank] += 1
            self.most = max(self.most, self.held[rank])
        return self.workers[rank].submit(self._work, rank, method.__name__, args, kwargs)

    def _work(self, rank, method, args, options):
        try:
            if self.dead[rank]:
                raise WorkerLost("engine", rank, "it is dead")
            if method != "generate":
                self.log.append((rank, method))
                if (rank, method) in self.dies_in:
                    self.dies_in.remove((rank, method))
                    raise WorkerLost("engine", rank, f"it died in {method}")
                return None
            time.sleep(0.002 * (rank + 1))
            prompts = args[0]
            fatal = [prompt for prompt in prompts if prompt in self.deaths]
            if fatal:
                self.deaths.remove(fatal[0])
                self.dead[rank] = True
                raise WorkerLost("engine", rank, "it died over it")
            return [(prompt, sample) for prompt in prompts for sample in range(options["samples_per_prompt"])]
        finally:
            with self.lock:
                self.held[rank] -= 1

    def heartbeat(self, rank) -> Future:
        future = Future()
        future.set_result(HEARTBEAT)
        return future

    def restart(self, ranks):
        for rank in ranks:
            assert not self.held[rank], "what it had must have come back first"
            self.log.append((rank, "restart"))
            self.dead[rank] = False

    def end(self, rank):
        raise AssertionError("nobody hangs")

    def close(self):
        for worker in self.workers:
            worker.shutdown()


def pool_of(group, **options):
    return EnginePool(group, rows_per_call=4, hang_s=60, log=lambda text: None, **({"max_restarts": 9} | options))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("deaths", [(), (0,), (5, 6, 22), (3, 3, 3), (24,)])
def test_everything_is_decoded_once_and_in_order(size, deaths):
    prompts = list(range(25))
    with Threads(size, deaths) as group:
        pool = pool_of(group)
        synced = []
        pool.sync_worker = synced.append
        found = pool.generate(prompts, None, role="train", seed=0, samples_per_prompt=2)
    assert found == [(prompt, sample) for prompt in prompts for sample in range(2)]
    assert pool.restarts == len(deaths) == len(synced), "one loss, however many calls the engine held"
    assert group.most == 2, "the next call waits at the engine"


def test_the_last_calls_are_shared():
    """Two calls for two engines: none of them waits behind the other."""
    with Threads(2) as group:
        assert len(pool_of(group).generate([1, 2, 3, 4], None, role="train", seed=0, samples_per_prompt=2)) == 8
        assert group.most == 1


def test_one_loss_too_many_is_raised():
    with Threads(2, (1, 2, 3)) as group, pytest.raises(WorkerLost, match="it died over it"):
        pool_of(group, max_restarts=2).generate(list(range(8)), None, role="train", seed=0)


@pytest.mark.parametrize("dies_in", [(), ((0, "sleep"),), ((1, "wake"),), ((0, "sleep"), (0, "wake"))])
def test_engines_sleep_while_others_work_and_wake_up_even_after_a_failure(dies_in):
    with Threads(2, dies_in=dies_in) as group:
        pool, clock = pool_of(group, sleeps=True), Clock()
        with pytest.raises(ZeroDivisionError), pool.asleep(clock):
            assert {rank for rank, method in group.log if method == "sleep"} == {0, 1}
            group.log.clear()
            print(1 / 0)
        assert {rank for rank, method in group.log if method == "wake"} == {0, 1}
        assert pool.restarts == len(dies_in) and clock.seconds["sleep_s"] >= 0


def test_engines_that_share_no_device_do_not_sleep():
    with Threads(2) as group, pool_of(group).asleep(Clock()):
        assert not group.log
