"""Weights to an engine in the learner's own process that keeps a copy of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from dllm_rl.protocols.transport import Transport


class InProcess(Transport):
    """The buffer itself is the payload."""

    @override
    def send(self, buffer: Tensor) -> Tensor:
        return buffer

    @override
    def receive(self, payload: Any, size: int, device: torch.device) -> Tensor:
        buffer: Tensor = payload.to(device)
        return buffer
