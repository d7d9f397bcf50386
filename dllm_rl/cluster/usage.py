"""What driver, engines and learners use."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any

import psutil

from dllm_rl.cluster.group import Heartbeat, WorkerGroup

_WAIT_S = 2.0  # who does not answer in time is left out of this step's figures


class Usage:
    """Memory and processor time of this process, and how long it has worked for its worker."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._worked, self._since = 0.0, 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        """The worker has something to do meanwhile."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            since, self._since = self._since, 0.0
            self._worked += time.monotonic() - since

    def heartbeat(self, ticks: int) -> Heartbeat:
        """A sign of life with current figures.

        Args:
            ticks: the worker's own measure of progress.
        """
        torch = sys.modules.get("torch")  # not worth importing for a figure
        on_gpu = torch is not None and torch.cuda.is_available()
        worked, since, cpu = self._worked, self._since, self._process.cpu_times()
        return Heartbeat(
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


class UsageMeter:
    """Remembers the last reading of each process, so that shares are those of the time in between."""

    def __init__(self) -> None:
        self._driver = Usage()
        self._last: dict[str, tuple[float, Heartbeat]] = {}

    def read(self, groups: Sequence[WorkerGroup]) -> dict[str, float]:
        """Metrics usage/<process>/...: resident memory, shares of processor and time, and those of its accelerator.

        Args:
            groups: whose workers are asked, all at once; the driver's own figures come with them.
        """
        found = self._figures("driver", self._driver.heartbeat(0))
        asked = {group.heartbeat(rank): f"{group.name}-{rank}" for group in groups for rank in range(group.size)}
        wait(asked, timeout=_WAIT_S)
        for future, name in asked.items():
            if future.done() and future.exception() is None:
                found |= self._figures(name, future.result())
        return found

    def _figures(self, name: str, heartbeat: Heartbeat) -> dict[str, float]:
        now, found = time.monotonic(), {"rss_mb": heartbeat.rss_bytes / (1 << 20)}
        if heartbeat.gpu_percent is not None:
            found |= {"gpu_mb": heartbeat.gpu_bytes / (1 << 20), "gpu_percent": heartbeat.gpu_percent}
        then, before = self._last.get(name, (now, heartbeat))
        self._last[name] = now, heartbeat
        if before.pid == heartbeat.pid and now > then:  # else it is another process by now
            found["cpu_percent"] = 100 * (heartbeat.cpu_s - before.cpu_s) / (now - then)
            if heartbeat.busy_s:
                found["busy_percent"] = min(100.0, 100 * (heartbeat.busy_s - before.busy_s) / (now - then))
        return {f"usage/{name}/{key}": value for key, value in found.items()}
