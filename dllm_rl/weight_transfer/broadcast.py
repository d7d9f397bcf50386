"""A process group of its own for weights: learner rank 0 and the engines, beside whatever DeepSpeed has set up."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Store:
    """Where workers of a group find each other; in the process of rank 0."""

    def __init__(self, host: str, timeout_s: float) -> None:
        self.host, self._timeout = host, timedelta(seconds=timeout_s)
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) for those who join."""
        return self.host, self._store.port


class Broadcast:
    """Sends tensors from rank 0 to all others."""

    def __init__(
        self, address: tuple[str, int], *, rank: int, size: int, host: str, device: torch.device, timeout_s: float
    ) -> None:
        """Join; returns when all have.

        Args:
            address: of the Store.
            rank: of this process, 0 = the sender.
            size: number of processes.
            host: address of this process's node, where others reach it.
            device: of the tensors; "cuda" uses NCCL, else gloo.
            timeout_s: for joining and for each broadcast.
        """
        timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
        self._cuda = device.type == "cuda"
        backend: Any = dist.ProcessGroupNCCL if self._cuda else dist.ProcessGroupGloo
        if self._cuda:
            options = backend.Options()
        else:
            options = backend._Options()
            options._devices = [backend.create_device(hostname=host)]
        options._timeout = timeout
        self._group = backend(store, rank, size, options)

    def __call__(self, buffer: Tensor) -> None:
        """Rank 0's buffer overwrites everybody else's. Raises RuntimeError if somebody does not take part in time."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([buffer], options).wait()
        if self._cuda:
            torch.cuda.current_stream(buffer.device).synchronize()  # the driver's clock is on the host
