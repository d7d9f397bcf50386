"""The connection to a Ray cluster. A cluster that was there before is never stopped, wiped or reconfigured."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from dllm_rl.errors import UserError, first_line


@contextmanager
def ray_connection(address: str | None, namespace: str, cpus: float) -> Iterator[None]:
    """Be connected inside.

    Args:
        address: of a running cluster ("auto", "host:port", "ray://..."); "local" starts a private one on this machine;
            None takes RAY_ADDRESS, else "local".
        namespace: where named things of this run live.
        cpus: what the run wants; a private cluster claims to have as many, so that workers may share cores.
    Raises:
        UserError: nothing answers there.
    """
    if ray.is_initialized():  # the caller's connection, the caller's to close
        yield
        return
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    private: dict[str, Any] = {"num_cpus": max(os.cpu_count() or 1, math.ceil(cpus)), "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=where, namespace=namespace, logging_level=logging.ERROR, **(private if where == "local" else {})
        )
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own in place, which exits at once
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster answers at '{where}' ({first_line(error)}); start one with 'ray start --head', or set "
            f"cluster.address: local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()  # ends a private cluster; from any other it only disconnects


def cluster_has_gpus() -> bool:
    """Whether the connected cluster has GPUs."""
    return bool(ray.cluster_resources().get("GPU", 0))
