"""Batches collected up to max_staleness steps before they are learned from: decoding and learning overlap.

By default the schedule does not depend on who is faster: batch s is decoded with the weights of step s - max_staleness
(of the start, for the first ones), so that a run is a function of its configuration and resumes with the same bits.

    max_staleness = 1      decode 0 | decode 1 | decode 2 | ...
                                    | learn 0  | learn 1  | ...      weights are pushed at every |

New weights wait there for engines that still decode with older ones. With pause_blocks they do not: completions pause
at the end of a block, the weights are pushed, and decoding goes on under them. Engines then rest only when
max_staleness batches wait for the learner, and every token knows the weights that chose it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from dllm_rl.config.schema import Config
from dllm_rl.diffusion.staleness import oldest_weights
from dllm_rl.driver.build import Run
from dllm_rl.driver.collect import Collected, collect, decode, demonstrate
from dllm_rl.reports.clock import Clock
from dllm_rl.types import GIVEN, Rewards, RolloutBatch, Trajectory, WeightsVersion

FILE = "prefetched.pt"
Batch = tuple[Collected, Clock]


@dataclass(slots=True)
class _PartialBatch:
    """A batch that is being decoded: its completions after some blocks."""

    trajectories: list[Trajectory] | None = None
    blocks: int = 0
    clock: Clock = field(default_factory=Clock)


class _Dropped(Exception):
    """The run went back while a batch was decoded."""


class RolloutPrefetcher:
    """Where the loop gets its batches from. A context manager."""

    def __init__(self, run: Run, config: Config) -> None:
        """Collect nothing yet.

        Args:
            run: its parts.
            config: of the run; its section rollout decides.
        """
        self._run, self._config = run, config
        self._lead = config.rollout.max_staleness if run.algorithm.needs.source == "rollouts" else 0
        # In one process the learner changes the weights that the engine decodes with: the same schedule, no overlap.
        overlap = self._lead > 0 and config.cluster.kind != "local"
        self._thread = ThreadPoolExecutor(1, "prefetch") if overlap else None
        self._pause = config.rollout.pause_blocks
        self._batches: dict[int, Future[Batch]] = {}
        self._partial: dict[int, _PartialBatch] = {}
        # Whoever uses the engines holds the second lock; who waits for it holds the first, so that turns alternate.
        self._turn, self._engines = Lock(), Lock()

    def get(self, step: int) -> Batch:
        """The batch of a step and how long its parts took; starts those that max_staleness allows to."""
        for later in range(step, min(step + self._lead, self._config.run.steps - 1) + 1):
            if later not in self._batches:
                self._batches[later] = self._start(later)
        return self._batches.pop(step).result()

    @contextmanager
    def engines_idle(self) -> Iterator[None]:
        """Nothing is decoded meanwhile: the engines are free for new weights, or for something else."""
        if self._pause is None:
            for future in self._batches.values():
                future.exception()  # raised when its step takes it
        with self._engines_alone():
            yield

    def drop(self) -> None:
        """Forget everything: the run goes back."""
        with self.engines_idle():
            self._batches, self._partial = {}, {}

    def save(self, folder: Path) -> None:
        """Write the batches that wait or have partial, decoded with weights that a resumed run no longer has."""
        with self.engines_idle():
            waiting = {step: _plain(future.result()) for step, future in self._batches.items() if future.done()}
            partial = {step: _plain_begun(one) for step, one in self._partial.items() if one.trajectories is not None}
        if waiting or partial:
            torch.save({"waiting": waiting, "partial": partial}, folder / FILE)

    def load(self, folder: Path, step: int) -> None:
        """Restore what save wrote, as far as max_staleness still allows it."""
        self.drop()
        if not (folder / FILE).is_file():
            return
        saved = torch.load(folder / FILE, weights_only=True)
        for number, values in saved["waiting"].items():
            found = _restored(values)
            if self._allows(step, number, oldest_weights(found[0].batch)):
                self._batches[number] = Future()
                self._batches[number].set_result(found)
        for number, values in saved["partial"].items():
            partial = _restored_begun(values)
            steps = torch.cat([t.weights_step[t.weights_step != GIVEN] for t in partial.trajectories or ()])
            if self._pause is not None and self._allows(step, number, int(steps.min())):
                self._partial[number] = partial

    def _allows(self, step: int, number: int, oldest: int) -> bool:
        return step <= number <= step + self._lead and number - oldest <= self._lead

    def _start(self, step: int) -> Future[Batch]:
        partial = self._partial.setdefault(step, _PartialBatch())
        if self._thread is not None:
            return self._thread.submit(self._collect, step, partial)
        future: Future[Batch] = Future()
        future.set_result(self._collect(step, partial))
        return future

    def _collect(self, step: int, partial: _PartialBatch) -> Batch:
        timer, prompts = partial.clock, self._run.source.batch(step)
        if self._run.algorithm.needs.source != "rollouts":
            del self._partial[step]
            return demonstrate(self._run, prompts), timer
        found = partial.trajectories
        while found is None or any(t.finish == "paused" for t in found):
            with self._engines_alone():
                self._require_wanted(step, partial)
                blocks = None if self._pause is None else partial.blocks + self._pause
                found = decode(self._run, self._config, prompts, step, timer, partial=found, max_blocks=blocks)
                partial.trajectories, partial.blocks = found, blocks or 0
        with self._engines_alone():
            self._require_wanted(step, partial)
            collected = collect(self._run, self._config, prompts, found, step, timer)
            del self._partial[step]
        return collected, timer

    def _require_wanted(self, step: int, partial: _PartialBatch) -> None:
        if self._partial.get(step) is not partial:
            raise _Dropped

    @contextmanager
    def _engines_alone(self) -> Iterator[None]:
        with self._turn:
            self._engines.acquire()
        try:
            yield
        finally:
            self._engines.release()

    def __enter__(self) -> RolloutPrefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self._partial = {}
        if self._thread is not None:
            self._thread.shutdown(wait=error[0] is None, cancel_futures=True)


def _plain(batch: Batch) -> dict[str, Any]:
    """Tensors and plain values only: what torch.load reads without running code."""
    collected, clock = batch
    return {
        "batch": _fields(collected.batch),
        "rewards": _fields(collected.rewards),
        "metrics": collected.metrics,
        "samples": [dict(sample) for sample in collected.samples],
        "uids": list(collected.uids),
        "seconds": clock.seconds,
    }


def _restored(values: dict[str, Any]) -> Batch:
    clock = Clock()
    clock.seconds = values["seconds"]
    collected = Collected(
        batch=RolloutBatch(**values["batch"]),
        rewards=Rewards(**values["rewards"]),
        metrics=values["metrics"],
        samples=values["samples"],
        uids=values["uids"],
    )
    return collected, clock


def _plain_begun(partial: _PartialBatch) -> dict[str, Any]:
    rows = [_fields(t) | {"weights": _fields(t.weights)} for t in partial.trajectories or ()]
    return {"trajectories": rows, "blocks": partial.blocks, "seconds": partial.clock.seconds}


def _restored_begun(values: dict[str, Any]) -> _PartialBatch:
    clock = Clock()
    clock.seconds = values["seconds"]
    rows = [Trajectory(**row | {"weights": WeightsVersion(**row["weights"])}) for row in values["trajectories"]]
    return _PartialBatch(rows, values["blocks"], clock)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
