"""Memory that runs out: one line with the phase and what to lower, exit code 1."""

from __future__ import annotations

import pickle

import numpy
import pytest
import torch

from dllm_rl.cli.errors import exit_code
from dllm_rl.cli.main import main
from dllm_rl.cluster.local_group import LocalWorkerGroup
from dllm_rl.errors import OutOfMemory, UserError, is_out_of_memory, memory_for

MORE_THAN_THERE_IS = 1 << 55
PLUGINS = """
import torch
from algorithms.diffu_grpo import DiffuGRPO
from rollouts.strategies.low_confidence import LowConfidence


class GreedyLoss(DiffuGRPO):
    def loss(self, new, experience):
        return torch.empty(1 << 55)


class GreedyMasks(DiffuGRPO):
    def masks(self, batch, generator, update=0):
        return torch.empty(1 << 55)


class GreedyChoice(LowConfidence):
    def select(self, candidates):
        return torch.empty(1 << 55)
"""


def of_torch():
    torch.empty(MORE_THAN_THERE_IS)


def of_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.1 GiB free.")


def of_numpy():
    numpy.empty(MORE_THAN_THERE_IS)


def of_python():
    bytearray(MORE_THAN_THERE_IS)


@pytest.mark.parametrize("allocate", [of_torch, of_cuda, of_numpy, of_python])
def test_every_kind_is_one_line(allocate, capsys):
    with (
        pytest.raises(
            OutOfMemory, match=r"out of memory in phase 'update' \(.*lower learner.tokens_per_microbatch"
        ) as it,
        memory_for("rollout"),
        memory_for("update"),
    ):
        allocate()
    assert str(pickle.loads(pickle.dumps(it.value))) == str(it.value), "it comes from another process"
    assert exit_code(it.value) == 1
    with pytest.raises(Exception) as raw:
        allocate()
    assert exit_code(raw.value) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert "dllm-rl plan CONFIG" in lines[0] and "the process ran out of memory" in lines[1]


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), UserError("y"), KeyboardInterrupt()])
def test_other_errors_pass(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as it, memory_for("update"):
        raise error
    assert it.value is error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": {"name": "greedy_plugins:GreedyLoss"}}, ["phase 'update'", "learner.tokens_per_microbatch"]),
        (
            {"sampling.strategy": {"name": "greedy_plugins:GreedyChoice"}},
            ["phase 'rollout'", "engine.max_batch_tokens"],
        ),
        ({"algorithm": {"name": "greedy_plugins:GreedyMasks"}}, ["the process ran out of memory", "dllm-rl plan"]),
    ],
    ids=["update", "rollout", "driver"],
)
def test_a_run_that_runs_out_says_where(changes, words, write, tmp_path, monkeypatch, capsys):
    (tmp_path / "greedy_plugins.py").write_text(PLUGINS)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["train", str(write({"diagnostics": {"every_steps": None}, **changes})), "--quiet"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines


class Greedy:
    """A worker whose second member runs out of memory."""

    def __init__(self, rank):
        self.rank = rank.rank

    def work(self):
        with memory_for("update"):
            return torch.empty(MORE_THAN_THERE_IS if self.rank else 1)


@pytest.mark.parametrize("kind", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_worker_tells_the_driver(kind, request):
    if kind == "local":
        group = LocalWorkerGroup("learner", Greedy, 2)
    else:
        request.getfixturevalue("ray_cluster")
        from dllm_rl.cluster.placement import Placement, ResourceRequest
        from dllm_rl.cluster.ray_group import RayWorkerGroup

        wanted = ResourceRequest(count=2, cpus=0.5, gpus=0.0)
        nothing = ResourceRequest(count=0, cpus=0.0, gpus=0.0)
        place = Placement.reserve(nothing, wanted, colocate=False, wait_s=30, log=print)
        request.addfinalizer(place.close)
        group = RayWorkerGroup("learner", Greedy, place.learners, {})
        group.restart(range(2))
    with group, pytest.raises(OutOfMemory, match="phase 'update'"):
        group.call(Greedy.work)
