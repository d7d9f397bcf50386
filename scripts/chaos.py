"""Kill what a run consists of while it works, and compare its final weights with those of an undisturbed run.

    python scripts/chaos.py                     # every fault in a run of its own
    python scripts/chaos.py engine learner      # these
    python scripts/chaos.py engine,learner node # two of them in one run
    python scripts/chaos.py engine --set rollout.max_staleness=1

Each line says what was killed, how long the run took and whether its weights are the same, bit for bit. Exit code 1 if
one differs. Only processes that this script has started are ended.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a private cluster on the loopback
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray
from safetensors.torch import load_file

from dllm_rl.cluster.group import WorkerGroup, WorkerLost
from dllm_rl.config.load import load_config
from dllm_rl.config.schema import Config
from dllm_rl.driver.engine_pool import EnginePool
from dllm_rl.driver.learner_group import LearnerGroup
from dllm_rl.models.digest import digest
from dllm_rl.reports.progress import Quiet
from dllm_rl.reports.run_folder import comparable
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.train import train

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tiny_sudoku_ray.yaml"
FAULTS = ("engine", "learner", "reward_worker", "node")
STEPS = 5


class Said(Quiet):
    """Keeps what the run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        """See Progress."""
        self.lines.append(text)


def at_work(group: WorkerGroup, rank: int, do: Callable[[], Any]) -> None:
    """Do something as soon as a worker has made progress from now on."""
    before = group.heartbeat(rank).result(60).ticks

    def watch() -> None:
        try:
            while group.heartbeat(rank).result(60).ticks == before:
                time.sleep(0.002)
        except WorkerLost:
            return
        do()

    threading.Thread(target=watch, daemon=True).start()


class Saboteur:
    """Waits for the right call of the driver, once per fault."""

    def __init__(self, faults: Sequence[str], cluster: Any) -> None:
        self.left, self._cluster = list(faults), cluster
        self._updates = self._rollouts = self._verdicts = 0
        self._generate, self._update, self._score = EnginePool.generate, LearnerGroup.update, RewardPool.score

    def generate(self, pool: EnginePool, *arguments: Any, **options: Any) -> Any:
        """In place of EnginePool.generate: strikes in the second step."""
        self._rollouts += 1
        if self._rollouts > 2 and "engine" in self.left:
            self.left.remove("engine")
            pid = pool.group.heartbeat(1).result(60).pid
            at_work(pool.group, 1, lambda: os.kill(pid, signal.SIGKILL))
        if self._rollouts > 2 and "node" in self.left:
            self.left.remove("node")
            at_work(pool.group, 1, lambda: self._drop_node_of(pool.group, 1))
        return self._generate(pool, *arguments, **options)

    def update(self, learner: LearnerGroup, *arguments: Any, **options: Any) -> Any:
        """In place of LearnerGroup.update: strikes in the fourth step, after a checkpoint and some more."""
        self._updates += 1
        if self._updates == 4 and "learner" in self.left:
            self.left.remove("learner")
            pid = learner.group.heartbeat(0).result(60).pid
            at_work(learner.group, 0, lambda: os.kill(pid, signal.SIGKILL))
        return self._update(learner, *arguments, **options)

    def score(self, pool: RewardPool, *arguments: Any) -> Any:
        """In place of RewardPool.score."""
        self._verdicts += 1
        if self._verdicts > 3 and "reward_worker" in self.left:
            self.left.remove("reward_worker")
            os.kill(pool._workers[0].process.pid, signal.SIGKILL)
        return self._score(pool, *arguments)

    def _drop_node_of(self, group: Any, rank: int) -> None:
        slot = group._slots[rank]
        where = ray.util.placement_group_table(slot.placement)["bundles_to_node_id"][slot.bundle]
        node = next(node for node in self._cluster.list_all_nodes() if node.node_id == where)
        self._cluster.remove_node(node)


def outcome(config: Config) -> tuple[str, list[dict[str, Any]], list[str]]:
    """Digest of the final weights, metrics without times, and what the run said."""
    said = Said()
    folder = train(config, progress=said).folder
    weights = load_file(next(folder.glob(f"checkpoints/step-{config.run.steps:06d}/model/*.safetensors")))
    return digest(weights.items()), comparable(folder), said.lines


def attempt(faults: Sequence[str], overrides: Sequence[str]) -> tuple[str, list[dict[str, Any]], list[str]]:
    """A run with faults, on a Ray cluster of its own."""
    with ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryDirectory())
        config = load_config(CONFIG, [f"run.output={output}", f"run.steps={STEPS}", *overrides])
        cluster = None
        if "node" in faults:
            from ray.cluster_utils import Cluster

            quiet = {"include_dashboard": False}
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **quiet})
            stack.callback(cluster.shutdown)
            for _ in range(2):
                cluster.add_node(num_cpus=2)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        else:
            ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        stack.callback(ray.shutdown)
        saboteur = Saboteur(faults, cluster)
        for owner, name in ((EnginePool, "generate"), (LearnerGroup, "update"), (RewardPool, "score")):
            method = getattr(saboteur, name)
            stack.enter_context(mock.patch.object(owner, name, lambda *a, method=method, **k: method(*a, **k)))
        found = outcome(config)
        assert not saboteur.left, f"never struck: {', '.join(saboteur.left)}"
        return found


def main() -> int:
    """Run the faults that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("faults", nargs="*", help=f"{', '.join(FAULTS)}; joined by commas: in one run (default: each)")
    parser.add_argument("--set", nargs="*", default=[], help="section.key=value on top of the configuration")
    arguments = parser.parse_args()
    plans = [tuple(fault.split(",")) for fault in arguments.faults or FAULTS]
    unknown = {fault for plan in plans for fault in plan} - set(FAULTS)
    if unknown:
        parser.error(f"unknown fault {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        one_process = ["cluster.kind=local", "cluster.engines=1", f"run.output={output}", f"run.steps={STEPS}"]
        expected = outcome(load_config(CONFIG, [*one_process, *arguments.set]))
    print(f"{'no fault, one process':40} {time.perf_counter() - started:6.1f} s  {expected[0]}", flush=True)
    if not all(row["grad_norm"] > 0 for row in expected[1] if "kept_rows" in row):
        print("a step of the undisturbed run changes no weight: the comparison would show nothing", file=sys.stderr)
        return 2
    wrong = 0
    for faults in plans:
        started = time.perf_counter()
        found = attempt(faults, arguments.set)
        same = found[:2] == expected[:2]
        wrong += not same
        verdict = "the same bits" if same else "DIFFERENT"
        print(f"{', '.join(faults):40} {time.perf_counter() - started:6.1f} s  {found[0]}  {verdict}", flush=True)
        for line in found[2]:
            print(f"    {line[:200]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
