"""The driver's view of all learner ranks: one learner, whose rows are dealt out and whose losses add up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Concatenate

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.cluster.group import P, R, WorkerGroup, WorkerLost, gather
from dllm_rl.cluster.watchdog import HEARTBEAT_S, Watchdog
from dllm_rl.learner.minibatches import split
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.protocols.learner import Learner
from dllm_rl.types import (
    GlobalCounts,
    LikelihoodEstimate,
    MaskSample,
    Minibatch,
    RolloutBatch,
    Sampling,
    TrainingBatch,
    WeightsVersion,
)
from dllm_rl.workers.learner_worker import LearnerWorker

_GRACE_S = 10.0  # after a failed collective, for the news of who died


class LearnerGroup(Learner):
    """All learner ranks as one Learner.

    Attributes:
        group: the ranks.
        step: finished optimiser steps (batches).
        restarts: how often the group was built anew.
        on_rebuild: told when it was.
    """

    def __init__(
        self, group: WorkerGroup[LearnerWorker], *, minibatches: int = 1, hang_s: float, max_restarts: int
    ) -> None:
        """Take over a group.

        Args:
            group: the ranks.
            minibatches: optimiser updates in a pass over a batch.
            hang_s: a rank that makes no micro-batch for so long while it has work is ended.
            max_restarts: how often the group may be built anew over the run.
        """
        self.group, self.step, self.restarts = group, 0, 0
        self.on_rebuild: Callable[[], None] = lambda: None
        self._minibatches, self._max_restarts = minibatches, max_restarts
        self._watch = Watchdog(group, hang_s)

    @override
    def update(self, training: TrainingBatch, algorithm: Algorithm) -> Mapping[str, float]:
        assert training.minibatches is None, "the group holds whole batches"
        shares = [training] if self.group.size == 1 else deal(training, self._minibatches, self.group.size)
        calls = [self.group.submit(rank, LearnerWorker.update, share, algorithm) for rank, share in enumerate(shares)]
        metrics = self._all(calls)[0]
        self.step += 1
        return metrics

    @override
    def score(
        self,
        batch: RolloutBatch,
        masks: MaskSample,
        *,
        reference: bool = False,
        draws: bool = False,
        sampling: Sampling | None = None,
    ) -> LikelihoodEstimate:
        def submit(rank: int, batch: RolloutBatch, masks: MaskSample) -> Future[LikelihoodEstimate]:
            return self.group.submit(
                rank, LearnerWorker.score, batch, masks, reference=reference, draws=draws, sampling=sampling
            )

        if self.group.size == 1:
            return self._all([submit(0, batch, masks)])[0]
        dealt = balance_rows(batch, self.group.size)
        scored = self._all(
            [submit(rank, batch.select(rows), masks.select(rows)) for rank, rows in enumerate(map(_or_any, dealt))]
        )
        back = torch.cat(dealt).argsort()
        used = [part for part, rows in zip(scored, dealt, strict=True) if len(rows)]
        return LikelihoodEstimate.join(used).select(back)

    @override
    def skip(self) -> Mapping[str, float]:
        self._same(LearnerWorker.skip)
        self.step += 1
        return {}

    @override
    def reference_digest(self) -> str:
        return self._same(LearnerWorker.reference_digest)

    @override
    def drop_reference(self) -> None:
        self._same(LearnerWorker.drop_reference)

    @override
    def version(self) -> WeightsVersion:
        return self._same(LearnerWorker.version)

    @override
    def save(self, folder: Path) -> None:
        self._same(LearnerWorker.save, folder)

    @override
    def load(self, folder: Path) -> None:
        self.step = self._same(LearnerWorker.load, folder)

    def rebuild(self, lost: WorkerLost) -> None:
        """Build all ranks anew, at step 0: a collective group cannot lose one of its own.

        Raises:
            WorkerLost: once too often, or not one of the learners.
        """
        while lost.group == self.group.name and self.restarts < self._max_restarts:
            self.restarts += 1
            try:
                self.group.restart(range(self.group.size))
                self.step = 0
                self.on_rebuild()
                return
            except WorkerLost as again:
                lost = again
        raise lost

    def _same(self, method: Callable[Concatenate[LearnerWorker, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a method of every rank with the same arguments; returns the leader's answer."""
        return self._all([self.group.submit(rank, method, *args, **kwargs) for rank in range(self.group.size)])[0]

    def _all(self, calls: Sequence[Future[R]]) -> list[R]:
        """Wait for one call per rank. When a rank is lost, the others wait for it in vain and are ended."""
        futures = {future: rank for rank, future in enumerate(calls)}
        for rank in futures.values():
            self._watch.begin(rank)
        left, failed = set(futures), False
        while left:
            done, left = wait(left, timeout=_GRACE_S if failed else HEARTBEAT_S, return_when=FIRST_COMPLETED)
            failures = [error for future in done if (error := future.exception()) is not None]
            if any(isinstance(error, WorkerLost) for error in failures) or (failed and not done):
                break
            failed = failed or bool(failures)
            if not done:
                self._watch.look([futures[future] for future in left])
        errors = [future.exception() for future in futures if future not in left]
        for future in left:
            self.group.end(futures[future])
        wait(left)
        lost = next((error for error in errors if isinstance(error, WorkerLost)), None)
        if lost is not None:  # what others raised is a consequence
            raise lost
        return gather(calls)


def _or_any(rows: Tensor) -> Tensor:
    """The rows of a rank, or one that lets a rank without any keep step with the others."""
    return rows if len(rows) else torch.zeros(1, dtype=torch.int64)


def deal(training: TrainingBatch, minibatches: int, size: int) -> list[TrainingBatch]:
    """What each rank trains on: its rows of every minibatch, the same number of minibatches on all ranks."""
    rows: list[list[Tensor]] = [[] for _ in range(size)]
    parts: list[list[Minibatch]] = [[] for _ in range(size)]
    for everyone in split(training.batch, minibatches):
        batch = training.batch.select(everyone)
        whole = GlobalCounts.of(batch)
        for rank, own in enumerate(balance_rows(batch, size)):
            taken, begin = everyone[_or_any(own)], sum(map(len, rows[rank]))
            place = torch.arange(begin, begin + len(taken))
            rows[rank].append(taken)
            parts[rank].append(Minibatch(place, dataclasses.replace(whole, idle=not len(own))))
    return [training.select(torch.cat(own), part) for own, part in zip(rows, parts, strict=True)]


def balance_rows(batch: RolloutBatch, size: int) -> list[Tensor]:
    """Rows of each rank: whole groups (pairs stay together), the largest first to whom has least to compute."""
    tokens = batch.valid.sum(-1)
    groups = [(batch.group == number).nonzero().flatten() for number in batch.group.unique().tolist()]
    groups.sort(key=lambda rows: -int(tokens[rows].sum()))  # stable: the same on every machine
    load = [0] * size
    dealt: list[list[Tensor]] = [[] for _ in range(size)]
    for rows in groups:
        least = load.index(min(load))
        load[least] += int(tokens[rows].sum())
        dealt[least].append(rows)
    return [torch.cat(rows).sort().values if rows else torch.zeros(0, dtype=torch.int64) for rows in dealt]
