"""Groups: workers in this process and in Ray actors answer alike; what dies is named and can be built anew."""

from __future__ import annotations

import os
import time

import pytest

from dllm_rl.cluster.group import WorkerLost, WorkerRank
from dllm_rl.cluster.local_group import LocalWorkerGroup


class Member:
    def __init__(self, place: WorkerRank) -> None:
        self.place, self.ticks, self.state = place, 0, 0

    def add(self, number: int, times: int = 1) -> int:
        self.state += number * times
        return self.state + self.place.rank

    def work(self, seconds: float) -> int:
        for _ in range(int(seconds * 20)):
            time.sleep(0.05)
            self.ticks += 1
        return os.getpid()

    def refuse(self) -> None:
        raise ValueError("such a number is not to be had")

    def die(self) -> None:
        os._exit(3)


def started(placement):
    from dllm_rl.cluster.ray_group import RayWorkerGroup

    group = RayWorkerGroup("engine", Member, placement.engines, {"OMP_NUM_THREADS": "1"})
    group.restart([0, 1])
    return group


@pytest.fixture(params=["local", "ray"])
def group(request):
    if request.param == "local":
        with LocalWorkerGroup("engine", Member, 2) as made:
            yield made
        return
    placement = request.getfixturevalue("placement")
    with started(placement) as made:
        yield made


@pytest.fixture(scope="module")
def session(ray_cluster):
    """Ray, for the tests of this file."""


@pytest.fixture
def placement(session):
    from dllm_rl.cluster.placement import Placement, ResourceRequest

    made = Placement.reserve(
        ResourceRequest(count=2, cpus=1, gpus=0),
        ResourceRequest(count=1, cpus=1, gpus=0),
        colocate=False,
        wait_s=30,
        log=print,
    )
    yield made
    made.close()


def test_members_are_called_together_and_one_by_one(group):
    assert group.call(Member.add, 3) == [3, 4]
    assert group.call(Member.add, 1, times=2) == [5, 6]
    assert group.submit(1, Member.add, 0).result() == 6
    assert group.heartbeat(0).result(30).ticks == 0


def test_what_a_member_raises_comes_out_as_it_was(group):
    with pytest.raises(ValueError) as caught:
        group.call(Member.refuse)
    assert str(caught.value) == "such a number is not to be had"
    assert group.call(Member.add, 1) == [1, 2], "it goes on working"


def test_a_restarted_member_starts_anew_and_the_others_go_on(group):
    group.call(Member.add, 5)
    group.restart([1])
    assert group.call(Member.add, 0) == [5, 1]


def test_a_pulse_is_felt_beside_a_call(placement):
    with started(placement) as group:
        busy = group.submit(0, Member.work, 3.0)
        time.sleep(1.0)
        heartbeat = group.heartbeat(0).result(30)
        assert 0 < heartbeat.ticks < 60 and not busy.done()
        assert heartbeat.pid == busy.result(30) != os.getpid() and heartbeat.rss_bytes > 1e6


def test_death_and_hanging_are_named_and_repaired(placement):
    with started(placement) as group:
        with pytest.raises(WorkerLost, match=r"engine 1 is lost: .*died") as caught:
            group.submit(1, Member.die).result(60)
        assert (caught.value.group, caught.value.rank) == ("engine", 1)
        with pytest.raises(WorkerLost, match="engine 1"):
            group.call(Member.add, 1)
        hanging = group.submit(0, Member.work, 600.0)
        group.end(0)
        with pytest.raises(WorkerLost, match=r"engine 0 is lost: .*no progress"):
            hanging.result(60)
        group.restart([0, 1])
        assert group.call(Member.add, 2) == [2, 3]


def test_a_wish_that_the_cluster_cannot_grant_is_refused_at_once(session):
    from dllm_rl.cluster.placement import Placement, ResourceRequest

    one = ResourceRequest(count=1, cpus=1, gpus=0)
    with pytest.raises(ValueError, match=r"wants 901 CPUs .* has 3; lower cluster.engines"):
        Placement.reserve(ResourceRequest(count=900, cpus=1, gpus=0), one, colocate=False, wait_s=5, log=print)
    with pytest.raises(ValueError, match=r"wants 1 GPUs .* has 0"):
        Placement.reserve(one, ResourceRequest(count=1, cpus=0, gpus=1), colocate=False, wait_s=5, log=print)


def test_waiting_says_what_is_wanted_and_what_is_free(placement, monkeypatch):
    from dllm_rl.cluster import placement as module

    monkeypatch.setattr(module, "SAY_EVERY_S", 1.0)
    heard = []
    one = module.ResourceRequest(count=1, cpus=1, gpus=0)
    with pytest.raises(ValueError, match=r"wait_s = 3 s: wanted 2 x \(1 CPU\); free: .* 0 CPU 0 GPU; stop other jobs"):
        module.Placement.reserve(one, one, colocate=False, wait_s=3, log=heard.append)
    assert len(heard) >= 2 and "wanted 2 x (1 CPU); free:" in heard[0]


def test_colocated_members_share_bundles():
    from dllm_rl.cluster.placement import ResourceRequest, _bundles

    engine, learner = ResourceRequest(count=3, cpus=1, gpus=0.5), ResourceRequest(count=2, cpus=2, gpus=0.5)
    bundles, at = _bundles(engine, learner, colocate=True)
    assert bundles == [{"CPU": 3, "GPU": 1.0}, {"CPU": 3, "GPU": 1.0}, {"CPU": 1, "GPU": 0.5}]
    assert at == {"engine": [0, 1, 2], "learner": [0, 1]}
    bundles, at = _bundles(engine, learner, colocate=False)
    assert len(bundles) == 5 and at == {"engine": [0, 1, 2], "learner": [3, 4]}
