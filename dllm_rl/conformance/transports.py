"""What every transport must keep to; see dllm_rl.protocols.transport. Both ends are tried in this process."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from dllm_rl.config.plugins import plugin_class
from dllm_rl.conformance.violation import NotCheckable, no_options, require
from dllm_rl.protocols.transport import Transport
from dllm_rl.seeding import generator_for

SIZES = (16, 48, 1 << 20, 16)  # bytes; buckets hold whole tensors, each aligned to 16
HOST, TIMEOUT_S = "127.0.0.1", 30.0
CPU = torch.device("cpu")


class Subject:
    """Two ends of a transport, connected if it is a collective one."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        no_options("transports", name, options)
        kind = plugin_class("transports", name)
        if why := kind.unavailable():
            raise NotCheckable(f"transports/{name}: {why}")
        self.sender: Transport = kind()
        self.receiver: Transport = kind()
        self.threads = ThreadPoolExecutor(2)
        if kind.collective:
            address, at = self.sender.open(HOST, TIMEOUT_S), {"host": HOST, "device": CPU, "timeout_s": TIMEOUT_S}
            self._both(
                lambda: self.sender.join(address, rank=0, size=2, **at),
                lambda: self.receiver.join(address, rank=1, size=2, **at),
            )

    def close(self) -> None:
        """End the threads."""
        self.threads.shutdown()

    def carry(self, buffer: Tensor) -> Tensor:
        """What arrives of a buffer."""
        if self.sender.collective:
            return self._both(lambda: self.sender.send(buffer), lambda: self.receiver.receive(None, len(buffer), CPU))
        return self.receiver.receive(self.sender.send(buffer), len(buffer), CPU)

    def _both(self, first: Any, second: Any) -> Any:
        futures = [self.threads.submit(end) for end in (first, second)]
        return [future.result(2 * TIMEOUT_S) for future in futures][1]


def what_is_sent_arrives(subject: Subject) -> None:
    """Buffers of several sizes arrive byte for byte, one after the other, and after release()."""
    for number, size in enumerate(SIZES):
        sent = torch.randint(256, (size,), dtype=torch.uint8, generator=generator_for(number, "conformance", "bytes"))
        kept = sent.clone()
        got = subject.carry(sent)
        require(torch.equal(got.cpu(), kept), f"buffer {number} of {size} bytes arrives as {tuple(got.shape)} others")
        require(torch.equal(sent, kept), f"send() has changed buffer {number}")
        subject.sender.release()
