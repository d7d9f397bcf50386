"""An engine in its process: it decodes when it may, and receives new weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dllm_rl.cluster.group import WorkerRank
from dllm_rl.errors import RunStopped, memory_for
from dllm_rl.protocols.engine import RolloutEngine
from dllm_rl.types import Prompt, Sampling, Trajectory, WeightsVersion
from dllm_rl.weight_transfer.receiver import WeightReceiver, size_of
from dllm_rl.weight_transfer.transports import Transports
from dllm_rl.workers.packing import PackedTrajectories, pack, unpack


class EngineWorker(WeightReceiver):
    """Guards an engine: no prompt reaches it while its weights are mixed or away."""

    def __init__(self, engine: RolloutEngine, rank: WorkerRank, *, packed: bool) -> None:
        """Take over an engine.

        Args:
            engine: any plugin.
            rank: of this worker.
            packed: answer with PackedTrajectories, for the way to another process.
        """
        super().__init__(engine, f"engine {rank.rank}")
        self._rank, self._packed, self._asleep, self._transports = rank, packed, False, Transports()

    @property
    def ticks(self) -> int:
        """The engine's heartbeat."""
        return self.engine.heartbeat()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        partial: PackedTrajectories | None = None,
        **options: Any,
    ) -> list[Trajectory] | PackedTrajectories:
        """Decode; the options are those of RolloutEngine.generate.

        Raises:
            RunStopped: the weights are not those of one version, or not there.
        """
        if not self.complete:
            raise RunStopped(f"engine {self._rank.rank} holds an unfinished push of weights and decodes nothing")
        if self._asleep:
            raise RunStopped(f"engine {self._rank.rank} is asleep and decodes nothing")
        start = None if partial is None else unpack(partial)
        with memory_for("rollout"):
            found = self.engine.generate(prompts, sampling, partial=start, **options)
        return pack(found) if self._packed else found

    def activate(self, weights: WeightsVersion) -> None:
        """Decode with these weights from now on: the driver has compared their digests."""
        self.accept()
        self.engine.weights = weights

    def join(self, transport: str, address: Any, size: int, timeout_s: float) -> None:
        """Enter the group of a collective transport, behind learner rank 0 and the engines before this one."""
        rank = self._rank
        self._transports[transport].join(
            address, rank=rank.rank + 1, size=size, host=rank.host, device=self.engine.device, timeout_s=timeout_s
        )

    def receive(self, number: int, transport: str, payload: Any) -> None:
        """Take a bucket from a transport."""
        size = size_of(self.layout[number])
        self.write(number, self._transports[transport].receive(payload, size, self.engine.device))

    def sleep(self) -> None:
        """Give the device's memory back until wake()."""
        self.engine.sleep()
        self._asleep = True

    def wake(self) -> None:
        """Undo sleep(); an engine that was built anew meanwhile is awake."""
        if self._asleep:
            self.engine.wake()
        self._asleep = False

    def shares_weights(self) -> bool:
        """Whether the engine decodes with the learner's own tensors."""
        return self.engine.shares_weights

    def probe_logits(self) -> Tensor | None:
        """See RolloutEngine."""
        return self.engine.probe_logits()

    def close(self) -> None:
        """End what the engine has started."""
        self.engine.close()
