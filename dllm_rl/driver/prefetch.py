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

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from dllm_rl.config.schema import Config
from dllm_rl.diffusion.staleness import oldest_weights
from dllm_rl.driver.build import Run
from dllm_rl.driver.collect import Collected, collect, demonstrate
from dllm_rl.driver.decoder import BatchDecoder, PartialBatch
from dllm_rl.driver.fair_lock import FairLock
from dllm_rl.driver.restored import restored
from dllm_rl.errors import UserError
from dllm_rl.reports.clock import Clock
from dllm_rl.types import GIVEN

FILE = "prefetched.pt"


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
        self._batches: dict[int, Future[Collected]] = {}
        self._partial: dict[int, PartialBatch] = {}
        self._engines = FairLock()

    def get(self, step: int) -> Collected:
        """The batch of a step; starts those that max_staleness allows to."""
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
        with self._engines:
            yield

    def drop(self) -> None:
        """Forget everything: the run goes back."""
        with self.engines_idle():
            self._batches, self._partial = {}, {}

    def save(self, folder: Path) -> None:
        """Write the batches that wait or are begun, decoded with weights that a resumed run no longer has."""
        with self.engines_idle():
            waiting = {step: asdict(future.result()) for step, future in self._batches.items() if future.done()}
            begun = {step: asdict(one) for step, one in self._partial.items() if one.trajectories}
        if waiting or begun:
            torch.save({"waiting": waiting, "partial": begun}, folder / FILE)

    def load(self, folder: Path, step: int) -> None:
        """Restore what save wrote, as far as max_staleness still allows it.

        Raises:
            UserError: the batches were written by a version that knew other fields.
        """
        self.drop()
        if not (folder / FILE).is_file():
            return
        saved = torch.load(folder / FILE, weights_only=True)
        try:
            waiting = {number: restored(Collected, values) for number, values in saved["waiting"].items()}
            begun = {number: restored(PartialBatch, values) for number, values in saved["partial"].items()}
        except (KeyError, TypeError) as error:
            raise UserError(
                f"'{folder / FILE}' holds batches of another version of dllm-rl ({error}); resume with the version "
                f"that wrote it, or from a checkpoint without that file"
            ) from None
        for number, batch in waiting.items():
            if self._allows(step, number, oldest_weights(batch.batch)):
                self._batches[number] = Future()
                self._batches[number].set_result(batch)
        for number, one in begun.items():
            steps = torch.cat([t.weights_step[t.weights_step != GIVEN] for t in one.trajectories])
            if self._pause is not None and self._allows(step, number, int(steps.min())):
                self._partial[number] = one

    def _allows(self, step: int, number: int, oldest: int) -> bool:
        return step <= number <= step + self._lead and number - oldest <= self._lead

    def _start(self, step: int) -> Future[Collected]:
        begun = self._partial.setdefault(step, PartialBatch())
        if self._thread is not None:
            return self._thread.submit(self._collect, step, begun)
        future: Future[Collected] = Future()
        future.set_result(self._collect(step, begun))
        return future

    def _collect(self, step: int, begun: PartialBatch) -> Collected:
        prompts = self._run.source.batch(step)
        if self._run.algorithm.needs.source != "rollouts":
            del self._partial[step]
            return demonstrate(self._run, prompts)
        engines = partial(self._engines_for, step, begun)
        decoder = BatchDecoder(self._run, self._config, step, begun, engines)
        collected = collect(self._run, self._config, prompts, decoder, Clock(begun.seconds), engines)
        with engines():
            del self._partial[step]
        return collected

    @contextmanager
    def _engines_for(self, step: int, begun: PartialBatch) -> Iterator[None]:
        """The engines, for a batch that the run still wants."""
        with self._engines:
            if self._partial.get(step) is not begun:
                raise _Dropped
            yield

    def __enter__(self) -> RolloutPrefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self._partial = {}
        if self._thread is not None:
            self._thread.shutdown(wait=error[0] is None, cancel_futures=True)
