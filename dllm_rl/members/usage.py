"""What engines and learners use, from their signs of life."""

from __future__ import annotations

from concurrent.futures import wait

from dllm_rl.runtime.group import Group, Pulse

_WAIT_S = 2.0  # who does not answer in time is left out of this step's figures


def usage(groups: list[Group]) -> dict[str, float]:
    """Metrics usage/<member>/...: resident memory and processor share, and the same of its accelerator.

    Args:
        groups: whose members are asked, all at once.
    """
    asked = {group.pulse(rank): f"usage/{group.name}-{rank}" for group in groups for rank in range(group.size)}
    wait(asked, timeout=_WAIT_S)
    found: dict[str, float] = {}
    for future, name in asked.items():
        if not future.done() or future.exception() is not None:
            continue
        pulse: Pulse = future.result()
        found[f"{name}/rss_mb"] = pulse.rss_bytes / (1 << 20)
        found[f"{name}/cpu_percent"] = pulse.cpu_percent
        if pulse.gpu_percent is not None:
            found[f"{name}/gpu_mb"] = pulse.gpu_bytes / (1 << 20)
            found[f"{name}/gpu_percent"] = pulse.gpu_percent
    return found
