"""Weights between processes that share a GPU: the receiver maps the sender's memory, nothing leaves the device."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from typing_extensions import override

from dllm_rl.protocols.transport import Transport


class CudaIPC(Transport):
    """Each learner rank serves the engine on its own device."""

    every_rank = True

    def __init__(self) -> None:
        self._held: Tensor | None = None

    @classmethod
    @override
    def unavailable(cls) -> str:
        return "" if torch.cuda.is_available() else "it needs a GPU"

    @override
    def send(self, buffer: Tensor) -> bytes:
        self._held = buffer  # freeing it before the receiver has copied would hand it memory of something else
        return pickle.dumps(reduce_tensor(buffer))

    @override
    def receive(self, payload: Any, size: int, device: torch.device) -> Tensor:
        rebuild, arguments = pickle.loads(payload)  # from our own learner, over Ray
        buffer: Tensor = rebuild(*arguments)
        return buffer

    @override
    def release(self) -> None:
        self._held = None
