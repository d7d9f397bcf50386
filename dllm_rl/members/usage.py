"""What engines and learners use, from their signs of life."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import wait

from dllm_rl.runtime.group import Group, Pulse

_WAIT_S = 2.0  # who does not answer in time is left out of this step's figures


class Meters:
    """Remembers the last reading of each member, so that shares are those of the time in between."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, Pulse]] = {}

    def read(self, groups: Sequence[Group]) -> dict[str, float]:
        """Metrics usage/<member>/...: resident memory, shares of processor and time, and those of its accelerator.

        Args:
            groups: whose members are asked, all at once.
        """
        asked = {group.pulse(rank): f"usage/{group.name}-{rank}" for group in groups for rank in range(group.size)}
        wait(asked, timeout=_WAIT_S)
        found: dict[str, float] = {}
        for future, name in asked.items():
            if not future.done() or future.exception() is not None:
                continue
            now, pulse = time.monotonic(), future.result()
            found[f"{name}/rss_mb"] = pulse.rss_bytes / (1 << 20)
            if pulse.gpu_percent is not None:
                found[f"{name}/gpu_mb"] = pulse.gpu_bytes / (1 << 20)
                found[f"{name}/gpu_percent"] = pulse.gpu_percent
            then, before = self._last.get(name, (now, pulse))
            if before.pid == pulse.pid and now > then:  # else it is another process by now
                found[f"{name}/cpu_percent"] = 100 * (pulse.cpu_s - before.cpu_s) / (now - then)
                found[f"{name}/busy_percent"] = min(100.0, 100 * (pulse.busy_s - before.busy_s) / (now - then))
            self._last[name] = now, pulse
        return found
