"""Many tiny steps while engines are killed at random: what was learned from, and whether memory grows.

    python scripts/soak.py                    # 500 steps, an engine killed about every 40
    python scripts/soak.py --steps 60 --kills 2

Runs on a private Ray cluster and ends only processes that it has started. Exit code 1 if a prompt is lost or repeated,
if the weights differ from those of the same run without kills, or if the memory of driver or learner grows by 5% or
more over the last half.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray
from chaos import CONFIG, Said, at_work
from safetensors.torch import load_file

from dllm_rl import seeding
from dllm_rl.config.load import load_config
from dllm_rl.driver.engine_pool import EnginePool
from dllm_rl.models.digest import digest
from dllm_rl.reports.run_folder import read_rows
from dllm_rl.train import train

LIMIT = 0.05
WATCHED = ("usage/driver/rss_mb", "usage/learner-0/rss_mb")


class Killer:
    """Kills an engine in mid-generation before some of the rollouts."""

    def __init__(self, steps: int, kills: int) -> None:
        random = seeding.python_random(0, "soak")
        self._before = {step: random.randrange(2) for step in random.sample(range(steps // 20, steps), kills)}
        self._calls, self.killed = 0, 0
        self._generate = EnginePool.generate

    def generate(self, pool: EnginePool, *arguments: Any, **options: Any) -> Any:
        """In place of EnginePool.generate."""
        rank = self._before.get(self._calls)
        self._calls += 1
        if rank is not None:
            pid = pool.group.heartbeat(rank).result(60).pid
            at_work(pool.group, rank, lambda: self._kill(pid))
        return self._generate(pool, *arguments, **options)

    def _kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.killed += 1


def run(folder: str, name: str, steps: int, kills: int, overrides: Sequence[str]) -> tuple[Path, int, int]:
    """The run's folder, engines killed, and engines that the run says it has lost."""
    config = load_config(
        CONFIG,
        [
            *(f"run.output={folder}", f"run.name={name}", f"run.steps={steps}", f"cluster.max_restarts={kills + 1}"),
            *(f"checkpoint.every_steps={steps}", "evaluate.at_end=false"),
            *overrides,
        ],
    )
    said, killer = Said(), Killer(steps, kills)
    with mock.patch.object(EnginePool, "generate", lambda *args, **options: killer.generate(*args, **options)):
        path = train(config, progress=said).folder
    return path, killer.killed, sum("built anew" in line for line in said.lines)


def prompt_errors(folder: Path, steps: int, prompts: int) -> list[str]:
    """What the ledger says about lost and repeated prompts; prompts is the size of an epoch."""
    ledger = list(read_rows(folder / "ledger.jsonl"))
    errors = []
    if [row["step"] for row in ledger] != list(range(1, steps + 1)):
        errors.append(f"{len(ledger)} entries for {steps} steps, or out of order")
    used = [uid for row in ledger for uid in row["uids"]]
    for begin in range(0, len(used), prompts):
        epoch = Counter(used[begin : begin + prompts])
        repeated = [uid for uid, count in epoch.items() if count > 1]
        if repeated:
            errors.append(f"epoch {begin // prompts}: {len(repeated)} prompts repeated, first {repeated[0]}")
        if begin + prompts <= len(used) and len(epoch) != prompts:
            errors.append(f"epoch {begin // prompts}: {prompts - len(epoch)} prompts lost")
    return errors


def growth(folder: Path, name: str) -> tuple[float, float, float]:
    """(MB at half time, MB at the end, relative growth), medians over a tenth of the run."""
    values = [row[name] for row in read_rows(folder / "metrics.jsonl") if name in row]
    tenth, half = max(1, len(values) // 10), len(values) // 2
    before, after = statistics.median(values[half : half + tenth]), statistics.median(values[-tenth:])
    return before, after, after / before - 1


def main() -> None:
    """Run, kill, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--prompts", type=int, default=200, help="size of the training set")
    parser.add_argument("--set", nargs="*", default=[], help="changes of the configuration")
    arguments = parser.parse_args()
    steps, kills = arguments.steps, max(1, arguments.steps // 40) if arguments.kills is None else arguments.kills
    overrides = [f"data.task.train_puzzles={arguments.prompts}", *arguments.set]
    failed = False
    with tempfile.TemporaryDirectory() as output:
        digests = []
        for name, number in (("calm", 0), ("soak", kills)):
            ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            folder, killed, lost = run(output, name, steps, number, overrides)
            weights = load_file(next(folder.glob(f"checkpoints/step-{steps:06d}/model/*.safetensors")))
            digests.append(digest(weights.items()))
            errors = prompt_errors(folder, steps, arguments.prompts)
            print(f"{name}: {steps} steps, {killed} engines killed, {lost} replaced; prompts: {errors or 'each once'}")
            failed |= bool(errors) or killed != number or lost != number
            for metric in WATCHED:
                before, after, grown = growth(folder, metric)
                print(f"  {metric}: {before:.0f} MB at half time, {after:.0f} MB at the end ({100 * grown:+.1f}%)")
                failed |= grown >= LIMIT
            ray.shutdown()
        same = digests[0] == digests[1]
        pauses = any("pause_blocks" in change for change in arguments.set)  # then bits depend on who is faster
        print(f"weights of the two: {'the same bits' if same else 'they differ'}{', which is allowed' * pauses}")
        failed |= not same and not pauses
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
