"""What every transport of weights must keep to; see dllm_rl.weight_transfer.transport."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from dllm_rl import registry
from dllm_rl.conformance.violation import NotChecked, require
from dllm_rl.weight_transfer.transport import Transport

RECEIVERS, TIMEOUT_S = 2, 30.0
SIZES = (16, 4096, 1 << 20)  # bytes


class Subject:
    """A sender and two receivers in threads of this process, on the device that the transport is for."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        kind: type[Transport] = registry.load("transports", name)
        why = kind.unavailable()
        if why:
            raise NotChecked(why)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.ends = [kind() for _ in range(1 + RECEIVERS)]
        if kind.collective:
            address = self.ends[0].open("127.0.0.1", TIMEOUT_S)
            self.together(lambda rank: self._join(rank, address))

    def _join(self, rank: int, address: Any) -> None:
        self.ends[rank].join(
            address, rank=rank, size=len(self.ends), host="127.0.0.1", device=self.device, timeout_s=TIMEOUT_S
        )

    def together(self, do: Callable[[int], Any]) -> list[Any]:
        """Do something in all of them at the same time; results by rank."""
        with ThreadPoolExecutor(len(self.ends)) as threads:
            return list(threads.map(do, range(len(self.ends))))

    def moved(self, buffer: Tensor) -> list[Tensor]:
        """What the receivers get."""
        sender, size = self.ends[0], buffer.numel()
        if sender.collective:
            return self.together(
                lambda rank: sender.send(buffer) if rank == 0 else self.ends[rank].receive(None, size, self.device)
            )[1:]
        payload = sender.send(buffer)
        return [end.receive(payload, size, self.device) for end in self.ends[1:]]


def what_is_sent_arrives(subject: Subject) -> None:
    """Every receiver gets a flat uint8 buffer with the bytes that were sent, buckets of any size one after another."""
    for number, size in enumerate(SIZES):
        buffer = (torch.arange(size, device=subject.device) * 31 + number).to(torch.uint8)
        for rank, got in enumerate(subject.moved(buffer.clone())):
            require(got.dtype == torch.uint8 and got.shape == (size,), f"receiver {rank}: {got.dtype} {got.shape}")
            require(torch.equal(got, buffer), f"receiver {rank}: other bytes than the {size} that were sent")
        subject.ends[0].release()
