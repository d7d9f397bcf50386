"""What driver, engines and learners use, from their signs of life."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import wait

from dllm_rl.runtime.group import Group, Pulse
from dllm_rl.runtime.usage import Usage

_WAIT_S = 2.0  # who does not answer in time is left out of this step's figures


class Meters:
    """Remembers the last reading of each process, so that shares are those of the time in between."""

    def __init__(self) -> None:
        self._driver = Usage()
        self._last: dict[str, tuple[float, Pulse]] = {}

    def read(self, groups: Sequence[Group]) -> dict[str, float]:
        """Metrics usage/<process>/...: resident memory, shares of processor and time, and those of its accelerator.

        Args:
            groups: whose members are asked, all at once; the driver's own figures come with them.
        """
        found = self._figures("driver", self._driver.pulse(0))
        asked = {group.pulse(rank): f"{group.name}-{rank}" for group in groups for rank in range(group.size)}
        wait(asked, timeout=_WAIT_S)
        for future, name in asked.items():
            if future.done() and future.exception() is None:
                found |= self._figures(name, future.result())
        return found

    def _figures(self, name: str, pulse: Pulse) -> dict[str, float]:
        now, found = time.monotonic(), {"rss_mb": pulse.rss_bytes / (1 << 20)}
        if pulse.gpu_percent is not None:
            found |= {"gpu_mb": pulse.gpu_bytes / (1 << 20), "gpu_percent": pulse.gpu_percent}
        then, before = self._last.get(name, (now, pulse))
        self._last[name] = now, pulse
        if before.pid == pulse.pid and now > then:  # else it is another process by now
            found["cpu_percent"] = 100 * (pulse.cpu_s - before.cpu_s) / (now - then)
            if pulse.busy_s:
                found["busy_percent"] = min(100.0, 100 * (pulse.busy_s - before.busy_s) / (now - then))
        return {f"usage/{name}/{key}": value for key, value in found.items()}
