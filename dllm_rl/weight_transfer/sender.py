"""The sending end of a push: a learner rank gathers a bucket of weights and gives it away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl.models.digest import tensor_digests
from dllm_rl.protocols.engine import TensorSpec
from dllm_rl.weight_transfer.receiver import size_of, views_of
from dllm_rl.weight_transfer.transports import STORE, Transports

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
    def spec(self) -> TensorSpec:
        """Shape and dtype, without gathering anything: those of the first source."""
        first = self.sources[0]
        return TensorSpec(self.name, tuple(getattr(first, "ds_shape", first.shape)), first.dtype)


class WeightSender:
    """Sends the weights of one learner rank; all ranks make the same calls in order: gathering is a collective."""

    def __init__(self, outgoing: Sequence[OutgoingTensor], gathering: Gathering, *, rank: int, host: str) -> None:
        """Send nothing yet.

        Args:
            outgoing: what is sent.
            gathering: makes sharded parameters whole while the context lasts.
            rank: of this learner; rank 0 speaks for all.
            host: where it can be reached.
        """
        self._outgoing, self._gathering = {one.name: one for one in outgoing}, gathering
        self._leads, self._host, self._transports = rank == 0, host, Transports()
        self._sent: dict[str, int] = {}

    @property
    def device(self) -> torch.device:
        """Where the buffers are made."""
        return next(iter(self._outgoing.values())).sources[0].device

    def tensor_specs(self) -> list[TensorSpec]:
        """What would be sent, in order."""
        return [one.spec for one in self._outgoing.values()]

    def open(self, transport: str, timeout_s: float) -> Any:
        """Address of a new meeting place; see Transport.open."""
        return self._transports[transport].open(self._host, timeout_s)

    def join(self, transport: str, address: Any, size: int, timeout_s: float) -> None:
        """Enter the group of a collective transport, as the one that sends; engines join at the same time."""
        way, host = self._transports[transport], self._host
        way.join(address, rank=0, size=size, host=host, device=self.device, timeout_s=timeout_s)

    def send(self, bucket: Sequence[TensorSpec], transport: str, *, keep: bool = False) -> tuple[Any, Any]:
        """Give a bucket away.

        Args:
            bucket: names of the tensors.
            transport: how.
            keep: put it into the object store too, for an engine that is built anew before the next push.
        Returns:
            (payload of the transport, payload in the object store), each None where there is none.
        """
        wanted = [self._outgoing[spec.name] for spec in bucket]
        sources = [source for one in wanted for source in one.sources]
        way = self._transports[transport]
        with torch.no_grad(), self._gathering(sources):
            if not self._leads and not way.every_rank:
                return None, None
            values = {one.name: one.make().detach() for one in wanted}
            self._sent |= tensor_digests(values.items())
            buffer = torch.empty(size_of(bucket), dtype=torch.uint8, device=self.device)
            for name, view in views_of(buffer, bucket).items():
                view.copy_(values[name])
        stored = self._transports[STORE].send(buffer) if keep and self._leads and transport != STORE else None
        payload = way.send(buffer)
        return payload, payload if transport == STORE else stored

    def finish(self) -> Mapping[str, int]:
        """Digests of what was sent since the last call."""
        sent, self._sent = self._sent, {}
        self._transports.release()
        return sent
