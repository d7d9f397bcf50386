"""The sending end of a push: a learner rank gathers a bucket of weights and gives it away."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dllm_rl.models.digest import tensor_digests
from dllm_rl.weight_transfer.broadcast import Broadcast, Store
from dllm_rl.weight_transfer.receiver import TensorSpec, fill, size_of

Transport = Literal["collective", "object_store", "cuda_ipc"]
Gathering = Callable[..., AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class OutgoingTensor:
    """A tensor that engines want, and what it is made of.

    Attributes:
        name: what engines call it.
        sources: parameters that must be whole when it is made.
        make: the tensor.
    """

    name: str
    sources: Sequence[nn.Parameter]
    make: Callable[[], Tensor]

    @property
    def entry(self) -> TensorSpec:
        """Shape and dtype, without gathering anything: those of the first source."""
        first = self.sources[0]
        return TensorSpec(self.name, tuple(getattr(first, "ds_shape", first.shape)), first.dtype)


class WeightSender:
    """Of one learner rank; all ranks do the same calls in the same order, because gathering is a collective."""

    def __init__(self, outgoing: Sequence[OutgoingTensor], gathering: Gathering, *, leader: bool, host: str) -> None:
        """Send nothing yet.

        Args:
            outgoing: what is sent.
            gathering: makes sharded parameters whole while the context lasts.
            leader: rank 0, which speaks for all.
            host: address of this node.
        """
        self._outgoing, self._gathering = {one.name: one for one in outgoing}, gathering
        self._leader, self._host = leader, host
        self._store: Store | None = None
        self._broadcast: Broadcast | None = None
        self._sent: dict[str, int] = {}
        self._held: Tensor | None = None

    @property
    def entries(self) -> list[TensorSpec]:
        """What would be sent, in order."""
        return [one.entry for one in self._outgoing.values()]

    def open(self, timeout_s: float) -> tuple[str, int]:
        """Address of a new meeting place for a process group."""
        self._broadcast = None
        self._store = Store(self._host, timeout_s)
        return self._store.address

    def join(self, size: int, timeout_s: float) -> None:
        """Set up the process group; engines join at the same time."""
        assert self._store is not None, "open() comes first"
        self._broadcast = Broadcast(
            self._store.address, rank=0, size=size, host=self._host, device=self._device, timeout_s=timeout_s
        )

    def send(self, bucket: Sequence[TensorSpec], transport: Transport, *, keep: bool = False) -> Any:
        """Give a bucket away.

        Args:
            bucket: names of the tensors.
            transport: how.
            keep: put it into the object store too, for an engine that is built anew before the next push.
        Returns:
            what engines need in order to find it; with the collective only if it is kept, else None.
        """
        wanted = [self._outgoing[entry.name] for entry in bucket]
        sources = [source for one in wanted for source in one.sources]
        with torch.no_grad(), self._gathering(sources):
            if not self._leader and transport != "cuda_ipc":
                return None
            values = {one.name: one.make().detach() for one in wanted}
            self._sent |= tensor_digests(values.items())
            buffer = torch.empty(size_of(bucket), dtype=torch.uint8, device=self._device)
            fill(buffer, bucket, values)
        stored = None
        if keep or transport == "object_store":
            import ray

            stored = [ray.put(buffer.cpu().numpy())] if self._leader else None  # a list: the driver must not fetch it
        if transport == "object_store":
            return stored
        if transport == "cuda_ipc":
            from torch.multiprocessing.reductions import reduce_tensor

            self._held = buffer  # must outlive the receiver's copy
            return pickle.dumps(reduce_tensor(buffer)), stored
        assert self._broadcast is not None, "join() comes first"
        self._broadcast(buffer)
        return stored

    def finish(self) -> Mapping[str, int]:
        """Digests of what was sent since the last call."""
        sent, self._sent, self._held = self._sent, {}, None
        return sent

    @property
    def _device(self) -> torch.device:
        return next(iter(self._outgoing.values())).sources[0].device


def received(payload: Any, device: torch.device) -> Tensor:
    """A flat uint8 buffer from what WeightSender.send returned."""
    if isinstance(payload, bytes):
        rebuild, arguments = pickle.loads(payload)  # from our own learner, over Ray
        buffer: Tensor = rebuild(*arguments)
        return buffer
    import ray

    array = ray.get(payload[0])
    return torch.frombuffer(bytearray(array) if not array.flags.writeable else array, dtype=torch.uint8).to(device)
