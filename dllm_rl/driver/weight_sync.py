"""Weights from the learners to the engines, checked by what the engines say they hold.

For each bucket the learners gather and send while the engines receive; every such call runs under a deadline, so that
what does not take part is named with its rank, the phase and the tensors. An engine gets no prompt until the digests
that it computed from its own parameters equal those of what was sent.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from dllm_rl.cluster.group import R, WorkerLost, gather
from dllm_rl.cluster.local_group import LocalWorkerGroup
from dllm_rl.config.plugins import plugin_class
from dllm_rl.driver.engine_pool import EnginePool
from dllm_rl.driver.learner_group import LearnerGroup
from dllm_rl.errors import PushError, PushTimeout
from dllm_rl.models.digest import joined
from dllm_rl.types import WeightsVersion
from dllm_rl.weight_transfer.receiver import Layout, buckets, compare, size_of
from dllm_rl.weight_transfer.transports import STORE
from dllm_rl.workers.engine_worker import EngineWorker
from dllm_rl.workers.learner_worker import LearnerWorker

_GRACE_S = 10.0  # a broken broadcast fails everywhere at once; the news of which process died comes a little later
_CHANGE = 1e-5  # of the largest logit; what a perturbed adapter must change at least


class WeightSync(ABC):
    """From a learner to engines."""

    def __init__(self, learner: LearnerGroup, engines: EnginePool) -> None:
        self._learner, self._engines = learner, engines

    @abstractmethod
    def push(self, *, allow_older: bool = False) -> WeightsVersion:
        """Give all engines the learners' weights.

        Args:
            allow_older: older weights than the engines hold are meant.
        """

    def verify(self) -> None:
        """The first act of a run: engines must hold what is sent, and decode with it.

        With an adapter, one of its matrices is changed, sent and changed back: logits must follow.

        Raises:
            PushError: they do not.
        """
        self.push(allow_older=True)
        learners, engines = self._learner.group, self._engines.group
        before = engines.call(EngineWorker.probe_logits)
        if not learners.call(LearnerWorker.perturb)[0]:
            return
        try:
            self.push()
            during = engines.call(EngineWorker.probe_logits)
        finally:
            learners.call(LearnerWorker.restore)
        self.push()
        after = engines.call(EngineWorker.probe_logits)
        for rank, (first, second, third) in enumerate(zip(before, during, after, strict=True)):
            if first is None or second is None or third is None:
                continue  # this engine cannot tell
            scale = first.abs().max().item() * _CHANGE
            if (second - first).abs().max().item() <= scale:
                raise PushError(f"engine {rank}: its logits do not change when the adapter that it is sent does")
            if (third - first).abs().max().item() > scale:
                raise PushError(f"engine {rank}: its logits did not come back with the adapter's old values")


class InProcessWeightSync(WeightSync):
    """Engines and the learner are one process and hold the same tensors: there is nothing to move."""

    def __init__(self, learner: LearnerGroup, engines: EnginePool) -> None:
        super().__init__(learner, engines)
        engines.sync_worker = self._sync_worker

    def _sync_worker(self, rank: int) -> None:
        """Tell a rebuilt engine which weights it holds."""
        self._engines.group.submit(rank, EngineWorker.activate, self._engines.weights).result()

    def push(self, *, allow_older: bool = False) -> WeightsVersion:
        """Tell the engines which weights they hold."""
        self._engines.weights = version = self._learner.version()
        self._engines.group.call(EngineWorker.activate, version)
        return version


@dataclass(frozen=True, slots=True)
class _Kept:
    """A push that can be repeated without the learners."""

    layout: Layout
    payloads: Sequence[Any]
    sent: Mapping[str, int]


class DistributedWeightSync(WeightSync):
    """Moves weights between processes.

    Attributes:
        bytes_sent: payload of the last push, once however many engines received it.
        seconds: of the last push, digests included.
    """

    def __init__(
        self,
        learner: LearnerGroup,
        engines: EnginePool,
        *,
        transport: str,
        bucket_bytes: int,
        timeout_s: float,
        keep: bool = False,
        log: Callable[[str], None],
    ) -> None:
        """Ask the learners what they have.

        Args:
            learner: sends.
            engines: receive; what they lose is re-synced from here.
            transport: how.
            bucket_bytes: largest bucket.
            timeout_s: for each bucket.
            keep: hold the last push in the object store, for engines that are lost while learners work on the next.
            log: told when another way had to be taken.
        """
        super().__init__(learner, engines)
        self._learners = learner.group
        self._transport = transport
        self._bucket_bytes, self._timeout_s, self._log = bucket_bytes, timeout_s, log
        self._keep, self._connected = keep, False
        self._kept: _Kept | None = None
        self.bytes_sent, self.seconds = 0, 0.0
        engines.sync_worker = self._sync_worker
        learner.on_rebuild = self._disconnect

    @override
    def push(self, *, allow_older: bool = False) -> WeightsVersion:
        """Move the weights, and try again with a new engine in the place of one that was lost on the way.

        Raises:
            PushError: what went wrong, with rank, phase and tensor.
            WorkerLost: a learner was lost, or more engines than may be.
        """
        while True:
            try:
                ranks = range(self._engines.group.size)
                if plugin_class("transports", self._transport).collective and not self._connected:
                    self._connect()
                self._engines.weights = self._push(ranks, self._transport, self._learner.step, allow_older=allow_older)
                return self._engines.weights
            except WorkerLost as lost:
                self._connected = False
                # Its successor gets the weights in the next attempt, with all others.
                self._engines.replace(lost, sync_worker=False)

    def _sync_worker(self, rank: int) -> None:
        """Give a rebuilt engine the weights that the others hold. Others may be decoding: no collective."""
        self._connected = False
        held = self._engines.weights
        if self._kept is None:
            # In one process there is no store, and nobody else who decodes.
            way = self._transport if isinstance(self._learners, LocalWorkerGroup) else STORE
            version = self._push([rank], way, held.step, allow_older=True)
        else:  # the learners may be at work on the next weights already
            self._begin([rank], held.step, self._kept.layout, allow_older=True)
            for number, payload in enumerate(self._kept.payloads):
                self._write(number, "", STORE, {rank: payload})
            version = self._settle([rank], held.step, self._kept.sent)
        if version != held:
            raise PushError(f"engine {rank} was given other weights than the other engines hold (step {held.step})")

    def _push(self, ranks: Sequence[int], transport: str, step: int, *, allow_older: bool) -> WeightsVersion:
        started = time.perf_counter()
        way = plugin_class("transports", transport)
        engines, learners, senders = self._engines.group, self._learners, range(self._learners.size)
        specs = learners.submit(0, LearnerWorker.tensor_specs).result(self._timeout_s)
        layout = buckets(specs, self._bucket_bytes)
        self._begin(ranks, step, layout, allow_older=allow_older)
        stored: list[Any] = []
        for number, bucket in enumerate(layout):
            what = f"{bucket[0].name} and {len(bucket) - 1} more" if len(bucket) > 1 else bucket[0].name
            sent = learners.calls(senders, LearnerWorker.send, bucket, transport, keep=self._keep)
            calls: dict[str, Future[Any]] = {**sent}
            if way.collective:  # both ends at the same time
                calls |= engines.calls(ranks, EngineWorker.receive, number, transport, None)
            answers = self._together("broadcast" if way.collective else "send", what, calls)
            if not way.collective:
                self._write(
                    number, what, transport, {rank: answers[rank if way.every_rank else 0][0] for rank in ranks}
                )
            stored.append(answers[0][1])
        digests = self._together("finish", "", learners.calls(senders, LearnerWorker.finish))[0]
        version = self._settle(ranks, step, digests)
        self._kept = _Kept(layout, stored, digests) if self._keep else None
        self.bytes_sent, self.seconds = sum(map(size_of, layout)), time.perf_counter() - started
        return version

    def _begin(self, ranks: Sequence[int], step: int, layout: Layout, *, allow_older: bool) -> None:
        calls = self._engines.group.calls(ranks, EngineWorker.begin_push, step, layout, allow_older=allow_older)
        self._together("begin", "", calls)

    def _write(self, number: int, what: str, transport: str, payloads: Mapping[int, Any]) -> None:
        engines, receive = self._engines.group, EngineWorker.receive
        calls = {
            f"{engines.name} {rank}": engines.submit(rank, receive, number, transport, payload)
            for rank, payload in payloads.items()
        }
        self._together("write", what, calls)

    def _settle(self, ranks: Sequence[int], step: int, sent: Mapping[str, int]) -> WeightsVersion:
        """Compare what engines hold with what was sent; then they may decode."""
        engines = self._engines.group
        commits = engines.calls(ranks, EngineWorker.commit_push, step)
        for name, held in zip(commits, self._together("commit", "", commits), strict=True):
            compare(name, sent, held)
        version = WeightsVersion(step=step, digest=joined(sent))
        self._together("accept", "", engines.calls(ranks, EngineWorker.activate, version))
        return version

    def _connect(self) -> None:
        learners, engines, name = self._learners, self._engines.group, self._transport
        size, limit = 1 + engines.size, self._timeout_s
        try:
            address = learners.submit(0, LearnerWorker.open, name, limit).result(limit)
            joins = learners.calls([0], LearnerWorker.join, name, address, size, limit)
            joins |= engines.calls(range(engines.size), EngineWorker.join, name, address, size, limit)
            self._together("join", "", joins)
            self._connected = True
        except (PushTimeout, RuntimeError) as error:
            if isinstance(error, WorkerLost):
                raise
            self._log(f"weights go through Ray's object store: no process group could be set up ({error})")
            self._transport = STORE

    def _disconnect(self) -> None:
        self._connected, self._kept = False, None  # what lost learners have stored is lost with them

    def _together(self, phase: str, what: str, calls: Mapping[str, Future[R]]) -> list[R]:
        """Wait for calls that were made at the same time; results in order.

        Args:
            phase: of the push, for messages.
            what: the tensors, for messages.
            calls: by the name of the worker.
        Raises:
            WorkerLost: a worker died.
            PushTimeout: naming who did not finish.
        """
        futures = list(calls.values())
        left = wait(futures, timeout=self._timeout_s, return_when=FIRST_EXCEPTION).not_done
        if any(future.done() and future.exception() for future in futures):  # the news of a death may come a bit later
            left = wait(left, timeout=_GRACE_S, return_when=FIRST_EXCEPTION).not_done
        errors = [future.exception() for future in futures if future.done()]
        lost = next((error for error in errors if isinstance(error, WorkerLost)), None)
        if lost is not None:  # what others raised is a consequence
            raise lost
        if left and not any(errors):
            names = ", ".join(sorted(name for name, future in calls.items() if future in left))
            raise PushTimeout(
                f"push of weights: {names} did not finish '{phase}'{f' of {what}' if what else ''} within "
                f"{math.ceil(self._timeout_s)} s"
            )
        return gather([future for future in futures if future.done()])
