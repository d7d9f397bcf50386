"""The connection to a Ray cluster. A cluster that was there before is never stopped, wiped or reconfigured."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import ray

from dllm_rl.cluster.address import refusal, require_answer
from dllm_rl.cluster.liveness import ClusterWatch, watch_cluster
from dllm_rl.cluster.private import private_cluster
from dllm_rl.errors import UserError, first_line


@contextmanager
def ray_connection(address: str | None, namespace: str, cpus: float) -> Iterator[ClusterWatch]:
    """Be connected inside; the watch that is given ends calls when the cluster is gone.

    Args:
        address: of a running cluster ("auto", "host:port", "ray://..."); "local" starts a private one on this machine;
            None takes RAY_ADDRESS, else "local".
        namespace: where named things of this run live.
        cpus: what the run wants, see private_cluster.
    Raises:
        UserError: nothing answers there.
    """
    with ExitStack() as stack:
        if ours := not ray.is_initialized():  # else it is the caller's connection, and the caller's to close
            where = address or os.environ.get("RAY_ADDRESS") or "local"
            options: Mapping[str, Any] = {}
            if where == "local":
                options = stack.enter_context(private_cluster(cpus))
            else:
                require_answer(where)
            _connect(where, namespace, options)
        watch = watch_cluster()
        watch.start()
        try:
            yield watch
        finally:
            if not watch.lost:
                watch.close()  # it must not take for a loss what ends now
            if ours:
                ray.shutdown()  # ends a private cluster; from any other it only disconnects
            watch.close()


def _connect(where: str, namespace: str, options: Mapping[str, Any]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=where, namespace=namespace, logging_level=logging.ERROR, **options)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own in place, which exits at once
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise UserError(refusal(where, first_line(error))) from error


def cluster_has_gpus() -> bool:
    """Whether the connected cluster has GPUs."""
    return bool(ray.cluster_resources().get("GPU", 0))
