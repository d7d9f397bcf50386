"""Runs that lose what they consist of, and runs that are told to stop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_rl.cluster.group import WorkerLost
from dllm_rl.driver.engine_pool import EnginePool
from dllm_rl.train import train

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ("cluster.kind=local", "cluster.engines=1")


def test_one_loss_too_many_saves_and_says_so(tiny, monkeypatch):
    calls = []

    def generate(engine, *arguments, **options):
        calls.append(None)
        if len(calls) == 4:
            raise WorkerLost("engine", 0, "it was killed")
        return original(engine, *arguments, **options)

    original = EnginePool.generate
    monkeypatch.setattr(EnginePool, "generate", generate)
    config = tiny(*LOCAL, "cluster.max_restarts=0", "checkpoint.every_steps=null", "evaluate.at_end=false")
    message = r"engine 0 is lost: it was killed; cluster.max_restarts = 0 are used up; step 3 is saved; .* --resume"
    with pytest.raises(RuntimeError, match=message):
        train(config)
    assert train(config, resume=True).steps == 5


def test_sigterm_or_whatever_asks_saves_between_steps(tiny):
    asked = iter([False, False, True, True])
    config = tiny(*LOCAL, "checkpoint.every_steps=null", "evaluate.at_end=false")
    assert train(config, stop=lambda: next(asked)).steps == 2
    assert train(config, resume=True).steps == 5


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["engine,learner,reward_worker", "node"], marks=pytest.mark.slow),
        pytest.param(
            ["engine,learner", "--set", "rollout.max_staleness=1", "rollout.correction=token"], marks=pytest.mark.slow
        ),
    ],
    ids=["in turn", "decoding ahead"],
)
def test_what_is_killed_leaves_no_trace_in_the_weights(arguments):
    """Engine in mid-generation, learner in mid-update, reward worker; a whole node; against a run in one process."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "chaos.py", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [one for one in arguments if one.split(",")[0] in ("engine", "node")]
    assert done.stdout.count("the same bits") == len(runs)
    assert "engine 1 is lost" in done.stdout and "learner 0 is lost" in done.stdout
