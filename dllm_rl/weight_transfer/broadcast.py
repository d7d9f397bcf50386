"""A process group of its own for weights: learner rank 0 and the engines, beside whatever DeepSpeed has set up."""

from __future__ import annotations

import secrets
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from dllm_rl.protocols.transport import Transport
from dllm_rl.weight_transfer.keyed_store import keyed_store


class Broadcast(Transport):
    """NCCL for buffers on GPUs, else gloo."""

    collective = True

    def __init__(self) -> None:
        self._store: Any = None
        self._group: Any = None
        self._cuda = False

    @override
    def open(self, host: str, timeout_s: float) -> tuple[str, int, str]:
        key = secrets.token_hex(16)
        self._store, port = keyed_store(host, 0, key, leads=True, timeout_s=timeout_s)
        return host, port, key

    @override
    def join(self, address: Any, *, rank: int, size: int, host: str, device: torch.device, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        store, _ = keyed_store(*address, leads=False, timeout_s=timeout_s)
        self._cuda = device.type == "cuda"
        # Backends are made directly: torch.distributed.new_group would need all processes in one default group, and
        # DeepSpeed's default group has only the learners in it.
        backend: Any = dist.ProcessGroupNCCL if self._cuda else dist.ProcessGroupGloo
        if self._cuda:
            options = backend.Options()
        else:
            options = backend._Options()  # private: the only way to choose the network interface of gloo
            options._devices = [backend.create_device(hostname=host)]
        options._timeout = timeout
        self._group = backend(store, rank, size, options)

    @override
    def send(self, buffer: Tensor) -> None:
        self._share(buffer)
        if not self._cuda:
            self._store = None  # everybody has met: nothing listens any more (NCCL's threads go on asking theirs)

    @override
    def receive(self, payload: Any, size: int, device: torch.device) -> Tensor:
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._share(buffer)
        return buffer

    def _share(self, buffer: Tensor) -> None:
        """Rank 0's buffer overwrites everybody else's. Raises RuntimeError if somebody does not take part in time."""
        assert self._group is not None, "join() comes first"
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([buffer], options).wait()
        if self._cuda:
            torch.cuda.current_stream(buffer.device).synchronize()  # the driver's clock is on the host
