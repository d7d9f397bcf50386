"""The watch ends calls that wait for a cluster that is gone, and no others."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from dllm_rl.cluster import liveness
from dllm_rl.cluster.liveness import ClusterLost, ClusterWatch


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(liveness, "LOOK_S", 0.001)


def test_calls_under_way_and_later_ones_fail(quick):
    gone = threading.Event()
    watch = ClusterWatch(lambda: "its raylet has ended" if gone.is_set() else "", 0.0)
    done, open_ = Future(), Future()
    watch.follow(done)
    watch.follow(open_)
    done.set_result(1)
    watch.start()
    try:
        gone.set()
        with pytest.raises(ClusterLost, match=r"its raylet has ended; go on from the newest checkpoint with --resume"):
            open_.result(30)
        later = Future()
        watch.follow(later)
        assert isinstance(later.exception(0), ClusterLost) and done.result(0) == 1
        watch.unless_lost(lambda: pytest.fail("the cluster is gone"))
    finally:
        watch.close()


def test_what_comes_back_in_time_is_not_given_up(quick):
    looks, seen = iter(["gone", "gone", ""]), threading.Event()

    def look():
        found = next(looks, None)
        if found is None:
            seen.set()
        return found or ""

    watch, future = ClusterWatch(look, 60.0), Future()
    watch.follow(future)
    watch.start()
    try:
        assert seen.wait(30) and not watch.lost and not future.done()
    finally:
        watch.close()
