"""Batches collected up to max_staleness steps before they are learned from: decoding and learning overlap.

The schedule does not depend on who is faster: batch s is decoded with the weights of step s - max_staleness (of the
start, for the first ones), so that a run is a function of its configuration and resumes with the same bits.

    max_staleness = 1      decode 0 | decode 1 | decode 2 | ...
                                    | learn 0  | learn 1  | ...      weights are pushed at every |
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dllm_rl.assembly import Parts
from dllm_rl.config.schema import Config
from dllm_rl.experience import Collected, demonstrate, roll_out
from dllm_rl.reports.clock import Clock
from dllm_rl.types import Rewards, RolloutBatch

FILE = "ahead.pt"
Batch = tuple[Collected, Clock]


class Ahead:
    """Where the loop gets its batches from. A context manager."""

    def __init__(self, parts: Parts, config: Config) -> None:
        """Collect nothing yet.

        Args:
            parts: of the run.
            config: of the run; rollout.max_staleness decides.
        """
        self._parts, self._config = parts, config
        self._lead = config.rollout.max_staleness if parts.algorithm.source == "rollouts" else 0
        # In one process the learner changes the weights that the engine decodes with: the same schedule, no overlap.
        overlap = self._lead > 0 and config.cluster.kind != "local"
        self._thread = ThreadPoolExecutor(1, "ahead") if overlap else None
        self._batches: dict[int, Future[Batch]] = {}

    def take(self, step: int) -> Batch:
        """The batch of a step and how long its parts took; starts those that the engines' weights are for."""
        for later in range(step, min(step + self._lead, self._config.run.steps - 1) + 1):
            if later not in self._batches:
                self._batches[later] = self._start(later)
        return self._batches.pop(step).result()

    def settle(self) -> None:
        """Wait for what is being decoded: the weights are about to change."""
        for future in self._batches.values():
            future.exception()  # raised when its step takes it

    def drop(self) -> None:
        """Forget everything: the run goes back."""
        self.settle()
        self._batches = {}

    def save(self, folder: Path) -> None:
        """Write the batches that wait, decoded with weights that a resumed run no longer has."""
        self.settle()
        if self._batches:
            torch.save({step: _plain(future.result()) for step, future in self._batches.items()}, folder / FILE)

    def load(self, folder: Path, step: int) -> None:
        """Restore what save wrote, as far as max_staleness still allows it."""
        self.drop()
        if not (folder / FILE).is_file():
            return
        for number, values in torch.load(folder / FILE, weights_only=True).items():
            age = number - int(values["batch"]["weights_step"].min())
            if step <= number <= step + self._lead and age <= self._lead:
                self._batches[number] = Future()
                self._batches[number].set_result(_restored(values))

    def _start(self, step: int) -> Future[Batch]:
        if self._thread is not None:
            return self._thread.submit(self._collect, step)
        future: Future[Batch] = Future()
        future.set_result(self._collect(step))
        return future

    def _collect(self, step: int) -> Batch:
        timer, prompts = Clock(), self._parts.source.batch(step)
        if self._parts.algorithm.source == "rollouts":
            return roll_out(self._parts, self._config, prompts, step, timer), timer
        return demonstrate(self._parts, prompts), timer

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
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


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
