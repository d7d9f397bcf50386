"""Weights through Ray's object store: needs no process group, and engines may come at any time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.protocols.transport import Transport


class ObjectStore(Transport):
    """Host memory that the workers of a node share; other nodes fetch a copy."""

    @classmethod
    @override
    def unavailable(cls) -> str:
        import ray

        return "" if ray.is_initialized() else "it needs a connection to Ray"

    @override
    def send(self, buffer: Tensor) -> Any:
        import ray

        return [ray.put(buffer.cpu().numpy())]  # in a list: the driver passes the reference on and must not fetch it

    @override
    def receive(self, payload: Any, size: int, device: torch.device) -> Tensor:
        import ray

        array = ray.get(payload[0])
        return torch.frombuffer(bytearray(array) if not array.flags.writeable else array, dtype=torch.uint8).to(device)
