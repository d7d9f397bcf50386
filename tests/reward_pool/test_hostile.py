"""Whatever a verifier attacks: no code in the driver, no hang, nothing left running, the host as it was."""

import contextlib
import importlib.util
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dllm_rl.config.schema import RewardPlugin
from dllm_rl.reward_pool import containment
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.reward_pool.process import Containment

spec = importlib.util.spec_from_file_location("hostile_cases", Path(__file__).with_name("hostile.py"))
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
TIMEOUT_S = 0.4
MARGIN_S = 6.0 if os.environ.get("PYTEST_XDIST_WORKER") else 1.0  # beside other tests the machine is busy


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostile_reward.py").write_text(cases.PRELUDE.replace("OWNED", str(folder / "owned")) + cases.REWARD)
    sys.path.insert(0, str(folder))
    os.environ["HF_TOKEN"] = "secret"
    with made_pool() as made:
        made.folder = folder
        yield made
    del os.environ["HF_TOKEN"]
    sys.path.remove(str(folder))


TAG = f"DLLM_RL_TEST={os.getpid()}"  # other tests have pools of their own at the same time


@pytest.fixture(scope="module", autouse=True)
def tagged():
    name, value = TAG.split("=")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        yield


def made_pool() -> RewardPool:
    limits = Containment(environment=[TAG.split("=")[0]])
    return RewardPool([RewardPlugin(name="hostile_reward:Hostile", timeout_s=TIMEOUT_S)], num_workers=1, limits=limits)


def processes() -> set[int]:
    """Those that a tagged worker has started, however they have left its session."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry.name != str(os.getpid()) and TAG.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.add(int(entry.name))
    return found


def score(pool, *texts):
    return pool.score(["p"] * len(texts), list(texts), {})


@pytest.mark.skipif(not containment.namespaces_available(), reason="NO NAMESPACES: containment is not tested here")
@pytest.mark.parametrize("name", cases.CASES)
def test_an_attack_fails_its_row_and_nothing_else(pool, name):
    code, statuses = cases.CASES[name]
    host = (os.getcwd(), dict(os.environ), signal.getsignal(signal.SIGTERM), sorted(sys.modules))
    assert score(pool, "value = 2.0").status == ("ok",)
    began = time.monotonic()
    rewards = score(pool, code)
    elapsed = time.monotonic() - began
    assert rewards.status[0] in statuses, (rewards.reasons, elapsed)
    assert not name.startswith("sends") or "broke the protocol of replies" in rewards.reasons[0]
    tries = 1 + any(
        words in rewards.reasons[0] for words in ("ended its process", "broke the protocol")
    )  # after a first death the row has another chance
    assert elapsed < tries * (TIMEOUT_S + MARGIN_S), rewards.reasons
    after = score(pool, "value = 3.0")  # the next rows have a worker that is well
    after = score(pool, "value = 3.0") if after.status != ("ok",) else after
    assert after.total.tolist() == [3.0], after.reasons
    assert host == (os.getcwd(), dict(os.environ), signal.getsignal(signal.SIGTERM), sorted(sys.modules))
    assert not (pool.folder / "owned").exists()


@pytest.mark.skipif(not containment.namespaces_available(), reason="NO NAMESPACES: containment is not tested here")
def test_nothing_is_left_running_nor_on_the_disk(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = processes() - {pid for pid in processes() if pid in workers(pool)}
    with made_pool() as made:
        for code in cases.STRAYS.values():
            score(made, code)
        assert len(list(tmp_path.iterdir())) == 1
    assert processes() - before - workers(pool) == set()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["setsid", "double fork", "a hundred forks", "kill the parent"])
def test_nothing_is_left_where_there_are_no_namespaces(pool, name, monkeypatch):
    """A supervisor that reaps orphans, and a mark in the environment for when it is killed itself."""
    monkeypatch.setattr(containment, "namespaces_available", lambda: False)
    before = processes()
    with made_pool() as made:
        score(made, cases.STRAYS[name])
    assert processes() - before == set()


def test_a_forged_verdict_costs_no_other_row(pool):
    forged = cases.STRAYS["forged verdict"]
    rewards = score(pool, *["value = 1.0", "value = 2.0", forged, "value = 3.0", "value = 4.0"] * 2)
    others = [0, 1, 3, 4, 5, 6, 8, 9]  # the forger is believed or fails, as its number in the request has it
    assert {rewards.status[row] for row in others} == {"ok"}
    assert rewards.total[others].tolist() == [1.0, 2.0, 3.0, 4.0] * 2


def workers(pool) -> set[int]:
    marks = [f"{containment.MARK}={worker.mark}".encode() for worker in pool._workers]
    found = set()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if any(mark in entry.read_bytes() for mark in marks):
                found.add(int(entry.parent.name))
    return found


def test_no_secret_and_no_network_reach_a_verifier(pool):
    seen = "value = float('HF_TOKEN' in os.environ)"
    net = "value = float(len(open('/proc/net/dev').read().splitlines()) > 3)"
    assert score(pool, seen).total.tolist() == [0.0]
    if containment.namespaces_available():
        assert score(pool, net).total.tolist() == [0.0]  # the loopback interface alone


def test_a_step_ends_when_its_seconds_are_spent(pool):
    limited = RewardPool(
        [RewardPlugin(name="hostile_reward:Hostile", timeout_s=TIMEOUT_S)], num_workers=1, max_seconds_per_step=1.5
    )
    with limited:
        score(limited, "value = 1.0")
        limited.begin_step(1)
        rewards = score(limited, *["forever()"] * 20)
        assert set(rewards.status) == {"timeout"} and "max_seconds_per_step = 1.5" in rewards.reasons[-1]
        assert "no verdict within" in rewards.reasons[0]
        limited.begin_step(None)
        assert all("no verdict within" in reason for reason in score(limited, *["forever()"] * 5).reasons)
        limited.begin_step(2)
        assert score(limited, "value = 1.0").status == ("ok",)


def test_there_are_sixty_attacks():
    assert len(cases.CASES) >= 60
