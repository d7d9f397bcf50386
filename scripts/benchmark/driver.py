"""What the driver costs: the share of a step in which no engine, verifier or learner computes.

    python scripts/benchmark/driver.py                # the tiny model, 64 prompts x 8
    python scripts/benchmark/driver.py --simulated    # engines and learner that cost nothing, 64 x 8 to 4,096 x 8

Real Ray actors on this machine, and the loop of a run. Members note when they begin and end a call; a moment of a step
belongs to the driver if no engine or learner is in a call and no reward is being scored. A push counts as computing.
With --simulated, engines answer with random tokens at once and the learner forgets what it is sent: what is left is the
driver, the verifiers and Ray's transport, per rollout.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from dllm_rl.config.load import load_config
from dllm_rl.driver import launch as workers
from dllm_rl.driver.build import build_run
from dllm_rl.driver.prefetch import RolloutPrefetcher
from dllm_rl.driver.reference_cache import ReferenceCache
from dllm_rl.driver.step import one_step
from dllm_rl.reports.progress import Quiet
from dllm_rl.seeding import generator_for
from dllm_rl.types import GIVEN, Trajectory, WeightsVersion
from dllm_rl.workers.packing import pack

ROOT = Path(__file__).resolve().parents[2]
Interval = tuple[float, float]


class Recorded:
    """A worker that notes when it had something to do."""

    def __init__(self, worker: Any, *, simulated: bool) -> None:
        self._worker, self._simulated = worker, simulated
        self._intervals: list[Interval] = []

    @property
    def ticks(self) -> int:
        """Of the worker."""
        return int(self._worker.ticks)

    def intervals(self) -> list[Interval]:
        """Begin and end of each call since the last time, on the machine's clock."""
        found, self._intervals = self._intervals, []
        return found

    def generate(self, prompts: Any, sampling: Any, **options: Any) -> Any:
        """Of the worker, or made up."""
        if self._simulated:
            return self._noted(_made_up, prompts, sampling, options["seed"], options["samples_per_prompt"])
        return self._noted(self._worker.generate, prompts, sampling, **options)

    def update(self, *arguments: Any, **options: Any) -> Mapping[str, float]:
        """Of the worker, or nothing."""
        if self._simulated:
            self._worker.learner.skip()
            return {}
        found: Mapping[str, float] = self._noted(self._worker.update, *arguments, **options)
        return found

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._noted, getattr(self._worker, name))

    def _noted(self, method: Any, *arguments: Any, **options: Any) -> Any:
        begin = time.time()
        try:
            return method(*arguments, **options)
        finally:
            self._intervals.append((begin, time.time()))


def _made_up(prompts: Sequence[Any], sampling: Any, seed: int, samples: int) -> Any:
    size, made = sampling.max_new_tokens, []
    for prompt, sample in itertools.product(prompts, range(samples)):
        length = len(prompt.token_ids)
        generated = torch.arange(length + size) >= length
        drawn = torch.randint(5, 9, (length + size,), generator=generator_for(seed, prompt.uid, sample))
        place = torch.arange(size)
        made.append(
            Trajectory(
                prompt_uid=prompt.uid,
                sample=sample,
                tokens=torch.where(generated, drawn, torch.tensor((*prompt.token_ids, *[0] * size))),
                prompt_length=length,
                completion_length=size,
                events=torch.stack([place, place + length, drawn[length:]], dim=1),
                unmask_step=torch.where(generated, torch.arange(length + size) - length, GIVEN),
                order=generated.long(),
                behaviour_logp=torch.where(generated, -0.5, 0.0),
                weights_step=torch.where(generated, 0, GIVEN),
                num_forwards=size,
                finish="length",
                exact=True,
                weights=WeightsVersion(step=0, digest=""),
            )
        )
    return pack(made)


def recorded(name: str, simulated: bool, *arguments: Any) -> Recorded:
    """What an actor builds."""
    return Recorded(getattr(workers, name)(*arguments), simulated=simulated)


def measure(prompts: int, steps: int, *, simulated: bool, engines: int) -> dict[str, float]:
    """Medians over steps, the first one left out."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            ROOT / "configs" / "tiny_sudoku_ray.yaml",
            [
                *(f"run.output={folder}", f"run.steps={steps + 1}", f"cluster.engines={engines}"),
                *(f"data.prompts_per_step={prompts}", "data.samples_per_prompt=8", "rollout.rows_per_call=64"),
                *(f"data.task.train_puzzles={max(200, prompts)}", "cluster.address=local"),
                *("diagnostics.every_steps=null", "cluster.cpus_per_engine=0.5", "cluster.cpus_per_learner=0.5"),
            ],
        )
        rows: list[dict[str, float]] = []
        with build_run(config, Path(folder) / "run", Quiet()) as run:
            assert run.reward_pool is not None
            scored: list[Interval] = []
            score = run.reward_pool.score

            def noted(*arguments: Any) -> Any:
                begin = time.time()
                try:
                    return score(*arguments)
                finally:
                    scored.append((begin, time.time()))

            run.reward_pool.score = noted  # type: ignore[method-assign]
            with run.reward_pool, RolloutPrefetcher(run, config) as prefetcher:
                run.weights.push(allow_older=True)
                references = ReferenceCache(run, config, Path(folder) / "run")
                for _ in range(steps + 1):
                    begin = time.time()
                    one_step(run, config, prefetcher, references)
                    end = time.time()
                    busy = [i for group in run.actors for one in group.call(Recorded.intervals) for i in one]
                    total, waited = end - begin, _covered(scored, begin, end)
                    rows.append(
                        {
                            "step": total,
                            "computing": _covered(busy, begin, end),
                            "scoring": waited,
                            "driver": total - _covered([*busy, *scored], begin, end),
                        }
                    )
                    scored.clear()
    return {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}


def _covered(intervals: Sequence[Interval], begin: float, end: float) -> float:
    """Seconds between begin and end that lie in any of the intervals."""
    total, reached = 0.0, begin
    for first, last in sorted(intervals):
        first, last = max(first, reached), min(last, end)
        if last > first:
            total, reached = total + last - first, last
    return total


def main() -> None:
    """Print a line per batch size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--prompts", type=int, nargs="+")
    arguments = parser.parse_args()
    for name in ("_engine_actor", "_learner_actor"):
        setattr(workers, name, functools.partial(recorded, name, arguments.simulated))
    sizes = arguments.prompts or ([64, 512, 4096] if arguments.simulated else [64])
    for prompts in sizes:
        found = measure(prompts, arguments.steps, simulated=arguments.simulated, engines=arguments.engines)
        rollouts = prompts * 8
        print(
            f"{prompts:5} x 8: step {found['step']:.2f} s, engines and learner compute {found['computing']:.2f} s, "
            f"verifiers {found['scoring']:.2f} s, driver {found['driver']:.3f} s = "
            f"{100 * found['driver'] / found['step']:.1f}% of the step, {1e6 * found['driver'] / rollouts:.0f} us per "
            f"rollout ({1e6 * found['step'] / rollouts:.0f} us of the step)",
            flush=True,
        )


if __name__ == "__main__":
    main()
