"""The contract of transports: how a bucket gets from a learner rank to an engine. One class with both ends."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor


class Transport:
    """Moves flat uint8 buffers; each worker has an instance of its own.

    Attributes:
        collective: all processes take part at the same time, in a group that open() and join() set up.
        every_rank: each learner rank sends to the engine of its number; else rank 0 sends to all.
    """

    collective: ClassVar[bool] = False
    every_rank: ClassVar[bool] = False

    @classmethod
    def unavailable(cls) -> str:
        """Why it cannot work in this process, "" if it can."""
        return ""

    def open(self, host: str, timeout_s: float) -> Any:
        """Give the address of a new meeting place. Called on learner rank 0 of a collective transport."""
        raise NotImplementedError

    def join(self, address: Any, *, rank: int, size: int, host: str, device: torch.device, timeout_s: float) -> None:
        """Enter the group; returns when all have.

        Args:
            address: what open() gave.
            rank: of this process, 0 = the learner that sends.
            size: number of processes.
            host: address of this process's node, where others reach it.
            device: of the buffers.
            timeout_s: for joining and for each transfer.
        """
        raise NotImplementedError

    def send(self, buffer: Tensor) -> Any:
        """Give a buffer away; returns what receive() needs in order to find it. The payload travels by pickle."""
        raise NotImplementedError

    def receive(self, payload: Any, size: int, device: torch.device) -> Tensor:
        """The buffer of a payload.

        Args:
            payload: what send() returned.
            size: bytes.
            device: where the buffer is wanted.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Forget buffers that had to outlive their receivers' copies."""
