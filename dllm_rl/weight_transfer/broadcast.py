"""A process group of its own for weights: learner rank 0 and the engines, beside whatever DeepSpeed has set up."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from dllm_rl.protocols.transport import Transport


class Broadcast(Transport):
    """NCCL for buffers on GPUs, else gloo."""

    collective = True

    def __init__(self) -> None:
        self._store: Any = None
        self._group: Any = None
        self._cuda = False

    @override
    def open(self, host: str, timeout_s: float) -> tuple[str, int]:
        self._store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        return host, self._store.port

    @override
    def join(self, address: Any, *, rank: int, size: int, host: str, device: torch.device, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        leader, port = address
        store = dist.TCPStore(leader, port, is_master=False, wait_for_workers=False, timeout=timeout)
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
