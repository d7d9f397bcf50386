"""Whatever a verifier does, the row is scored, or excluded in time; never scored 0, never in the way of other rows."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dllm_rl.config.schema import RewardPlugin
from dllm_rl.reward_pool.containment import MARK
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.tasks.sudoku import Sudoku4

SLACK_S = 0.5  # how far beyond its deadline a verifier may live


@pytest.fixture
def pool(naughty):
    """pool("naughty:f", timeout_s=1) -> a started pool of one worker, closed after the test."""
    opened: list[RewardPool] = []

    def make(*names: str, num_workers: int = 1, timeout_s: float = 5.0) -> RewardPool:
        opened.append(RewardPool([RewardPlugin(name=n, timeout_s=timeout_s) for n in names], num_workers=num_workers))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def score(pool, *completions, **columns):
    return pool.score(["p"] * len(completions), list(completions), columns)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def marked(mark: str) -> list[int]:
    """The processes of a worker; process ids that it sees itself are those of its namespace."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
    return sorted(found)


def test_values_land_in_their_rows_whatever_the_order(pool):
    texts = ["x" * (n % 37) for n in range(300)]
    rewards = score(pool("naughty:good", num_workers=2), *texts)
    assert rewards.total.tolist() == [float(n % 37) for n in range(300)]
    assert rewards.included.all() and set(rewards.status) == {"ok"}
    assert rewards.total.dtype == torch.float32


def test_a_verifier_sees_one_row_with_its_columns(pool):
    rewards = pool("naughty:columns_seen").score(["p"] * 3, ["x"] * 3, {"answer": ["a", "b", "a"], "level": [3] * 3})
    assert rewards.total.tolist() == [1.0, 0.0, 1.0]


def test_components_are_weighted_and_the_worst_status_counts(naughty):
    specs = [
        RewardPlugin(name="naughty:as_told", weight=2.0),
        RewardPlugin(name="naughty:good", weight=-0.5),
        RewardPlugin(name="naughty:Picky", weight=10.0, scale=3),
    ]
    told = ["return [0.25]", "return [Verdict(0.5, 'invalid')]", "return [None]", "raise"]
    with RewardPool(specs) as pool:
        rewards = score(pool, *told)
    first, second, third = (rewards.components[spec.name] for spec in specs)
    assert first.nan_to_num(-1).tolist() == [0.25, 0.5, -1, -1]
    assert second.tolist() == [len(t) for t in told] and third.tolist() == [3.0] * 4
    lengths = torch.tensor([float(len(t)) for t in told])
    expected = 2 * torch.tensor([0.25, 0.5, 0.0, 0.0]) - 0.5 * lengths + 30
    assert rewards.total[:3].tolist() == expected[:3].tolist()
    assert rewards.status == ("ok", "invalid", "ok", "error")
    assert rewards.included.tolist() == [True, True, True, False]  # None is "not applicable", an error is a failure


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("raise out of luck", "RuntimeError: out of luck"),
        ("exit 7", "exit code 7"),
        ("systemexit", "SystemExit: 0"),
        ("interrupt", "KeyboardInterrupt"),
        ("signal SIGKILL", "exit code -9"),
        ("segfault", "exit code -11"),
        ("hang_up", "ended its process"),
        ("return []", "must return one finite number or None per completion, returned [] for one"),
        ("return [1.0, 1.0]", "returned [1.0, 1.0] for one"),
        ("return None", "returned None for one"),
        ("return ['1.0']", "returned ['1.0'] for one"),
        ("return [float('nan')]", "returned [nan]"),
        ("return [float('inf')]", "returned [inf]"),
        ("return [1j]", "returned [1j]"),
    ],
)
def test_a_failed_verifier_is_an_error_and_the_others_go_on(pool, told, message):
    started = time.monotonic()
    scored = pool("naughty:as_told")
    rewards = score(scored, "fine", told, "fine", "fine", "fine", "fine")  # three rows are handed over at a time
    assert rewards.status == ("ok", "error", "ok", "ok", "ok", "ok")
    assert rewards.included.tolist() == [True, False, True, True, True, True]
    assert rewards.total[[0, 2, 3, 4, 5]].tolist() == [1.0] * 5 and rewards.components["naughty:as_told"][1].isnan()
    assert message in str(scored.failures[-1]) and "reward 'naughty:as_told': " in str(scored.failures[-1])
    assert time.monotonic() - started < 4  # by what happened, not by the deadline of 5 s


@pytest.mark.parametrize("told", ["spin", "grind", "sleep 60", "signal SIGSTOP"])
def test_a_verifier_that_overruns_is_killed_in_time(pool, told):
    scored = pool("naughty:as_told", timeout_s=0.4)
    score(scored, "fine")  # the worker has started
    started = time.monotonic()
    rewards = score(scored, told)
    assert 0.4 <= time.monotonic() - started < 0.4 + SLACK_S
    assert rewards.status == ("timeout",) and not rewards.included.any()
    assert "no verdict within 0.4 s" in str(scored.failures[-1])
    rewards = score(scored, "fine", told, "fine", "fine", "fine")  # its successor goes on with the rest of its rows
    assert rewards.status == ("ok", "timeout", "ok", "ok", "ok")
    assert rewards.total.tolist() == [1.0, 0.0, 1.0, 1.0, 1.0]


def test_the_deadline_starts_when_work_starts(pool):
    """Twelve rows of 0.15 s on one worker: the last one waits 1.65 s, four times its deadline."""
    rewards = score(pool("naughty:as_told", timeout_s=0.4), *["sleep 0.15"] * 12)
    assert set(rewards.status) == {"ok"} and rewards.total.tolist() == [1.0] * 12


def test_one_that_hangs_does_not_hold_up_the_others(pool):
    scored = pool("naughty:as_told", num_workers=2, timeout_s=1.0)
    score(scored, "fine", "fine")
    started = time.monotonic()
    rewards = score(scored, "spin", *["sleep 0.02"] * 20)
    assert rewards.status == ("timeout", *["ok"] * 20)
    assert time.monotonic() - started < 1.0 + SLACK_S


def test_prints_cannot_corrupt_the_channel(pool):
    rewards = score(pool("naughty:as_told"), "print", "return [0.5]", "print")
    assert rewards.total.tolist() == [1.0, 0.5, 1.0]


def test_what_a_verifier_started_dies_with_it(pool, tmp_path):
    scored = pool("naughty:as_told", timeout_s=1.0)
    score(scored, "fine")
    mark, idle = scored._workers[0].mark, len(marked(scored._workers[0].mark))
    assert score(scored, f"fork {tmp_path / 'pid'}").status == ("timeout",)
    assert idle >= 2 and (tmp_path / "pid").exists() and marked(mark) == []


def test_a_worker_that_dies_idle_costs_no_row(pool, tmp_path):
    scored = pool("naughty:as_told")
    score(scored, "fine")
    pid = marked(scored._workers[0].mark)[-1]  # the innermost one runs verifiers
    os.kill(pid, signal.SIGKILL)
    assert gone_within(pid, 1.0)
    assert score(scored, "fine", "fine").status == ("ok", "ok")


def test_an_interrupted_call_leaves_no_answer_for_the_next(pool, monkeypatch):
    scored = pool("naughty:as_told", num_workers=2)
    score(scored, "fine", "fine")

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KeyboardInterrupt):
        score(scored, *["sleep 0.3"] * 4)
    signal.signal(signal.SIGALRM, previous)
    assert score(scored, "return [0.5]", "return [0.25]", "return [2]").total.tolist() == [0.5, 0.25, 2.0]


def test_a_call_interrupted_right_after_it_has_sent_rows_leaves_no_answer_for_the_next(pool, monkeypatch):
    scored = pool("naughty:as_told", num_workers=1)
    score(scored, "fine", "fine")
    worker = scored._workers[0]
    send = worker.send

    def sends_and_is_interrupted():
        send()
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "send", sends_and_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(scored, "return [0.125]", "return [0.75]", "fine")
    monkeypatch.undo()
    assert score(scored, "return [2]", "return [0.25]", "return [0.5]").total.tolist() == [2.0, 0.25, 0.5]


def test_workers_start_without_torch(pool):
    rewards = score(
        pool("naughty:modules", "sudoku"), "torch", "numpy", "transformers", puzzle=["."] * 3, answer=["1"] * 3
    )
    assert rewards.components["naughty:modules"].tolist() == [0.0, 0.0, 0.0]


def test_the_current_directory_does_not_shadow_our_packages(pool, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "rewards").mkdir(parents=True)
    (elsewhere / "rewards" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(elsewhere)
    assert score(pool("length"), "x", completion_tokens=[10]).status == ("ok",)


def test_workers_die_with_their_parent(naughty, tmp_path):
    """Also one that is busy and would not notice a closed pipe."""
    program = f"""
import sys
sys.path.insert(0, {str(naughty)!r})
from dllm_rl.config.schema import RewardPlugin
from dllm_rl.reward_pool.containment import MARK
from dllm_rl.reward_pool.pool import RewardPool
pool = RewardPool([RewardPlugin(name="naughty:as_told", timeout_s=60)], num_workers=2)
pool.score(["p"], ["fine"], {{}})
print(*(w.process.pid for w in pool._workers), flush=True)
pool.score(["p"], ["spin"], {{}})
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(map(alive, workers))
    time.sleep(0.2)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert all(gone_within(pid, 2.0) for pid in workers)


def test_close_ends_the_workers(naughty):
    with RewardPool([RewardPlugin(name="naughty:good")], num_workers=2) as pool:
        score(pool, "x")
        workers = [worker.process.pid for worker in pool._workers]
    assert not any(map(alive, workers))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([{"name": "sudokuu"}], "unknown reward 'sudokuu'; nearest is 'sudoku'"),
        ([{"name": "sudoku"}, {"name": "sudoku"}], "reward 'sudoku' is listed twice"),
        ([{"name": "sudoku", "modee": "cells"}], r"unknown key 'rewards\.sudoku\.modee'; nearest is 'rew"),
        ([{"name": "naughty:nothing"}], "module 'naughty' has no 'nothing'"),
    ],
)
def test_a_reward_that_cannot_be_made_is_refused_before_any_process_starts(naughty, specs, message):
    with pytest.raises(ValueError, match=message):
        RewardPool([RewardPlugin(**spec) for spec in specs])


def test_a_worker_that_cannot_start_is_an_error_not_a_loop(naughty):
    with (
        RewardPool([RewardPlugin(name="naughty:Unstartable")], num_workers=1) as pool,
        pytest.raises(RuntimeError, match="ended at start-up with exit code 3"),
    ):
        score(pool, "x")


def test_a_reward_that_refuses_to_be_built_says_why(naughty):
    with (
        RewardPool([RewardPlugin(name="naughty:Refusing")], num_workers=1) as pool,
        pytest.raises(ValueError, match="no judge model at 'x'"),
    ):
        score(pool, "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("option", ["weight", "timeout_s"])
def test_an_option_that_is_not_finite_is_refused(option, value):
    with pytest.raises(ValueError, match="finite number"):
        RewardPlugin(name="sudoku", **{option: value})


def test_a_sum_beyond_float32_is_a_failed_row(naughty):
    with RewardPool([RewardPlugin(name="naughty:as_told", weight=10.0)]) as pool:
        rewards = score(pool, "return [3e38]", "return [1e30]", "return [1e39]")
    assert rewards.status == ("error", "ok", "error") and rewards.total.isfinite().all()
    assert "weighted sum" in rewards.reasons[0] and "float32 ends at 3.4e38" in rewards.reasons[2]


def test_columns_travel_as_json_and_what_cannot_is_named(naughty):
    import datetime

    (naughty / "columns_seen.py").write_text(
        "def when(completions, day, **columns):\n    return [float(day == ['2024-05-01'])]\n"
    )
    with RewardPool([RewardPlugin(name="columns_seen:when")], num_workers=1) as pool:
        assert score(pool, "x", day=[datetime.date(2024, 5, 1)]).total.tolist() == [1.0]
        with pytest.raises(ValueError, match="data column 'day' cannot be handed to reward functions: object is"):
            score(pool, "x", day=[object()])
        assert score(pool, "x", day=["2024-05-01"]).total.tolist() == [1.0]


def test_throughput():
    """54,000 rows a second on two idle cores; the bound leaves room for busy ones."""
    examples = Sudoku4(Sudoku4.Config(test_puzzles=256)).examples("test")
    columns = {"puzzle": [e.columns["puzzle"] for e in examples], "answer": [e.answer for e in examples]}
    with RewardPool([RewardPlugin(name="sudoku")], num_workers=2) as pool:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            rewards = pool.score([e.prompt for e in examples], [e.answer for e in examples], columns)
            seconds.append(time.perf_counter() - started)
    assert rewards.total.tolist() == [1.0] * 256
    assert 256 / min(seconds) > 5000
