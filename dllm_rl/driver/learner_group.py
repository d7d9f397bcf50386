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
from dllm_rl.diffusion.advantage import select
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.protocols.learner import Learner
from dllm_rl.types import GlobalCounts, LikelihoodEstimate, MaskSample, Rewards, RolloutBatch, WeightsVersion
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

    def __init__(self, group: WorkerGroup[LearnerWorker], *, hang_s: float, max_restarts: int) -> None:
        """Take over a group.

        Args:
            group: the ranks.
            hang_s: a rank that makes no micro-batch for so long while it has work is ended.
            max_restarts: how often the group may be built anew over the run.
        """
        self.group, self.step, self.restarts = group, 0, 0
        self.on_rebuild: Callable[[], None] = lambda: None
        self._hang_s, self._max_restarts = hang_s, max_restarts
        self._watch = Watchdog(group, hang_s)

    @override
    def update(
        self,
        batch: RolloutBatch,
        rewards: Rewards,
        advantage: Tensor,
        masks: Sequence[MaskSample],
        algorithm: Algorithm,
        *,
        reference: Sequence[LikelihoodEstimate] | None,
        counts: GlobalCounts | None = None,
    ) -> Mapping[str, float]:
        assert counts is None, "the group holds whole batches"
        submit, update = self.group.submit, LearnerWorker.update
        calls: list[Future[Mapping[str, float]]] = []
        if self.group.size == 1:
            calls.append(submit(0, update, batch, rewards, advantage, masks, algorithm, reference=reference))
        else:
            whole = GlobalCounts.of(batch)
            for rank, rows in enumerate(balance_rows(batch, self.group.size)):
                idle = not len(rows)
                rows = torch.zeros(1, dtype=torch.int64) if idle else rows
                few = (batch.select(rows), rewards.select(rows), select(advantage, rows))
                drawn = [one.select(rows) for one in masks]
                part = None if reference is None else [one.select(rows) for one in reference]
                counts = dataclasses.replace(whole, idle=idle)
                calls.append(submit(rank, update, *few, drawn, algorithm, reference=part, counts=counts))
        metrics = self._all(calls)[0]
        self.step += 1
        return metrics

    @override
    def score(
        self, batch: RolloutBatch, masks: MaskSample, *, reference: bool = False, draws: bool = False
    ) -> LikelihoodEstimate:
        submit, score = self.group.submit, LearnerWorker.score
        if self.group.size == 1:
            return self._all([submit(0, score, batch, masks, reference=reference, draws=draws)])[0]
        dealt = balance_rows(batch, self.group.size)
        shares = [rows if len(rows) else torch.zeros(1, dtype=torch.int64) for rows in dealt]
        scored = self._all(
            [
                submit(rank, score, batch.select(r), masks.select(r), reference=reference, draws=draws)
                for rank, r in enumerate(shares)
            ]
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
