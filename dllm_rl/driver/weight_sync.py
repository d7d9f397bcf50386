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

from dllm_rl.cluster.group import WorkerGroup, WorkerLost, gather
from dllm_rl.driver.engine_pool import EnginePool
from dllm_rl.driver.learner_group import LearnerGroup
from dllm_rl.models.digest import joined
from dllm_rl.types import WeightsVersion
from dllm_rl.weight_transfer.receiver import Layout, PushError, PushTimeout, TensorSpec, buckets, compare, size_of
from dllm_rl.weight_transfer.sender import Transport

_Call = tuple[WorkerGroup, int, str, tuple[Any, ...], Mapping[str, Any]]
_GRACE_S = 10.0
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
        before = engines.call("probe")
        if not learners.call("perturb")[0]:
            return
        try:
            self.push()
            during = engines.call("probe")
        finally:
            learners.call("restore")
        self.push()
        after = engines.call("probe")
        for rank, (first, second, third) in enumerate(zip(before, during, after, strict=True)):
            scale = first.abs().max().item() * _CHANGE
            if (second - first).abs().max().item() <= scale:
                raise PushError(f"engine {rank}: its logits do not change when the adapter that it is sent does")
            if (third - first).abs().max().item() > scale:
                raise PushError(f"engine {rank}: its logits did not come back with the adapter's old values")


class InProcessWeightSync(WeightSync):
    """Engines and the learner are one process and hold the same tensors: there is nothing to move."""

    def push(self, *, allow_older: bool = False) -> WeightsVersion:
        """Tell the engines which weights they hold."""
        self._engines.weights = version = self._learner.version()
        self._engines.group.call("activate", version)
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
        transport: Transport,
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
        self._transport: Transport = transport
        self._bucket_bytes, self._timeout_s, self._log = bucket_bytes, timeout_s, log
        self._keep, self._connected = keep, False
        self._kept: _Kept | None = None
        self.bytes_sent, self.seconds = 0, 0.0
        engines.sync_worker = self._sync_worker
        learner.on_rebuild = self._disconnect

    def push(self, *, allow_older: bool = False) -> WeightsVersion:
        """See WeightSync.

        Raises:
            PushError: what went wrong, with rank, phase and tensor.
            WorkerLost: a learner was lost, or more engines than may be.
        """
        while True:
            try:
                ranks = range(self._engines.group.size)
                if self._transport == "collective" and not self._connected:
                    self._connect()
                self._engines.weights = self._push(
                    ranks, allow_older=allow_older, transport=self._transport, step=self._learner.step
                )
                return self._engines.weights
            except WorkerLost as lost:
                self._connected = False
                # Its successor is synced by the next attempt, with all others.
                self._engines.replace(lost, sync_worker=False)

    def _sync_worker(self, rank: int) -> None:
        """A rebuilt engine gets the weights that the others hold. Others may be decoding: no collective."""
        self._connected = False
        held = self._engines.weights
        if self._kept is None:
            version = self._push([rank], allow_older=True, transport="object_store", step=held.step)
        else:  # the learners may be at work on the next weights already
            engines = self._engines.group
            self._together(
                "begin", "", [(engines, rank, "begin", (held.step, self._kept.layout), {"allow_older": True})]
            )
            for number, payload in enumerate(self._kept.payloads):
                self._together("write", "", [(engines, rank, "write", (number, payload), {})])
            version = self._settle([rank], held.step, self._kept.sent)
        if version != held:
            raise PushError(f"engine {rank} was given other weights than the other engines hold (step {held.step})")

    def _push(self, ranks: Sequence[int], *, allow_older: bool, transport: Transport, step: int) -> WeightsVersion:
        started = time.perf_counter()
        entries: list[TensorSpec] = self._learners.submit(0, "entries").result(self._timeout_s)
        layout = buckets(entries, self._bucket_bytes)
        engines, learners = self._engines.group, range(self._learners.size)
        self._together(
            "begin", "", [(engines, rank, "begin", (step, layout), {"allow_older": allow_older}) for rank in ranks]
        )
        stored: list[Any] = []
        for number, bucket in enumerate(layout):
            what = f"{bucket[0].name} and {len(bucket) - 1} more" if len(bucket) > 1 else bucket[0].name
            keep = {"keep": self._keep}
            sends: list[_Call] = [(self._learners, rank, "send", (bucket, transport), keep) for rank in learners]
            if transport == "collective":
                sends += [(engines, rank, "write", (number, None), {}) for rank in ranks]
                stored.append(self._together("broadcast", what, sends)[0])
                continue
            payloads = self._together("send", what, sends)
            if transport == "cuda_ipc":
                stored.append(payloads[0][1])
                gifts = [(rank, payloads[rank][0]) for rank in ranks]
            else:
                stored.append(payloads[0])
                gifts = [(rank, payloads[0]) for rank in ranks]
            self._together("write", what, [(engines, rank, "write", (number, gift), {}) for rank, gift in gifts])
        finishes: list[_Call] = [(self._learners, rank, "finish", (), {}) for rank in learners]
        sent: Mapping[str, int] = self._together("finish", "", finishes)[0]
        version = self._settle(ranks, step, sent)
        self._kept = _Kept(layout, stored, sent) if self._keep else None
        self.bytes_sent, self.seconds = sum(map(size_of, layout)), time.perf_counter() - started
        return version

    def _settle(self, ranks: Sequence[int], step: int, sent: Mapping[str, int]) -> WeightsVersion:
        """Compare what engines hold with what was sent; then they may decode."""
        engines = self._engines.group
        held = self._together("commit", "", [(engines, rank, "commit", (step,), {}) for rank in ranks])
        for rank, digests in zip(ranks, held, strict=True):
            compare(f"engine {rank}", sent, digests)
        version = WeightsVersion(step=step, digest=joined(sent))
        self._together("accept", "", [(engines, rank, "activate", (version,), {}) for rank in ranks])
        return version

    def _connect(self) -> None:
        size = 1 + self._engines.group.size
        try:
            address = self._learners.submit(0, "open", self._timeout_s).result(self._timeout_s)
            joins: list[_Call] = [(self._learners, 0, "join", (size, self._timeout_s), {})]
            joins += [
                (self._engines.group, rank, "join", (address, size, self._timeout_s), {})
                for rank in range(self._engines.group.size)
            ]
            self._together("join", "", joins)
            self._connected = True
        except (PushTimeout, RuntimeError) as error:
            if isinstance(error, WorkerLost):
                raise
            self._log(f"weights go through Ray's object store: no process group could be set up ({error})")
            self._transport = "object_store"

    def _disconnect(self) -> None:
        self._connected, self._kept = False, None  # what lost learners have stored is lost with them

    def _together(self, phase: str, what: str, calls: Sequence[_Call]) -> Any:
        """Make calls at the same time; results in order.

        Raises:
            WorkerLost: a worker died.
            PushTimeout: naming who did not finish.
        """
        of: dict[Future[Any], str] = {}
        for group, rank, method, arguments, options in calls:
            of[group.submit(rank, method, *arguments, **options)] = f"{group.name} {rank}"
        left = wait(of, timeout=self._timeout_s, return_when=FIRST_EXCEPTION).not_done
        if any(future.done() and future.exception() for future in of):  # the news of a death may come a little later
            left = wait(left, timeout=_GRACE_S, return_when=FIRST_EXCEPTION).not_done
        errors = [future.exception() for future in of if future.done()]
        lost = next((error for error in errors if isinstance(error, WorkerLost)), None)
        if lost is not None:  # what others raised is a consequence
            raise lost
        if left and not any(errors):
            names = ", ".join(sorted(of[future] for future in left))
            raise PushTimeout(
                f"push of weights: {names} did not finish '{phase}'{f' of {what}' if what else ''} within "
                f"{math.ceil(self._timeout_s)} s"
            )
        return gather([future for future in of if future.done()])
