"""What a process uses."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from dllm_rl.runtime.group import Pulse


class Usage:
    """Memory and processor time of this process, and how long it has worked for its member."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._worked, self._since = 0.0, 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        """The member has something to do meanwhile."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            since, self._since = self._since, 0.0
            self._worked += time.monotonic() - since

    def pulse(self, ticks: int) -> Pulse:
        """A sign of life with current figures.

        Args:
            ticks: the member's own measure of progress.
        """
        torch = sys.modules.get("torch")  # not worth importing for a figure
        on_gpu = torch is not None and torch.cuda.is_available()
        worked, since, cpu = self._worked, self._since, self._process.cpu_times()
        return Pulse(
            ticks=ticks,
            pid=os.getpid(),
            host=socket.gethostname(),
            rss_bytes=self._process.memory_info().rss,
            cpu_s=cpu.user + cpu.system,
            busy_s=worked + (time.monotonic() - since if since else 0.0),
            gpu_bytes=torch.cuda.memory_allocated() if torch is not None and on_gpu else 0,
            gpu_percent=_busy(torch) if on_gpu else None,
        )


def _busy(torch: Any) -> float | None:
    try:
        return float(torch.cuda.utilization())
    except Exception:  # nvidia-ml-py is not installed, or the driver does not tell
        return None
