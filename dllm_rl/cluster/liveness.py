"""Notices that the cluster itself is gone. Ray's calls then never return, or Ray ends the process after a minute."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

import ray

from dllm_rl.errors import RunStopped

LOOK_S = 0.5  # between two looks
PATIENCE_S = 30.0  # a head node that restarts is away for seconds; Ray itself would end this process after 60
LEAVE_S = 20.0  # a thread that sits in a call of Ray's own cannot be woken, and never runs a handler of a signal
ESSENTIAL = ("gcs_server", "raylet")


class ClusterLost(RunStopped):
    """The Ray cluster is gone, and with it all workers."""


class ClusterWatch:
    """Ends the calls that are under way when the cluster is gone; every later one fails at once.

    Attributes:
        lost: what is known about the end; "" while the cluster is there.
    """

    def __init__(self, look: Callable[[], str], patience_s: float) -> None:
        """Look at nothing yet; see start().

        Args:
            look: tells what is missing, "" if nothing is.
            patience_s: how long something may be missing before it is given up.
        """
        self.lost = ""
        self._look, self._patience_s = look, patience_s
        self._open: set[Future[Any]] = set()
        self._lock = threading.Lock()  # a future that is followed while the cluster is given up must not be missed
        self._left = threading.Event()

    def follow(self, future: Future[Any]) -> None:
        """Fail this future, which is not done yet, with ClusterLost when the cluster is lost."""
        with self._lock:
            if not self.lost:
                self._open.add(future)
                future.add_done_callback(self._open.discard)
                return
        self._fail(future)

    def unless_lost(self, function: Callable[[], object]) -> None:
        """Call a function that needs the cluster, if it is still there."""
        if not self.lost:
            function()

    def start(self) -> None:
        """Look after the cluster until close(); whoever has not left LEAVE_S after its end is ended, exit code 1."""
        threading.Thread(target=self._watch, name="cluster-watch", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._left.set()

    def _watch(self) -> None:
        missing_since: float | None = None
        while not self._left.wait(LOOK_S):
            missing, now = self._look(), time.monotonic()
            if not missing:
                missing_since = None
                continue
            missing_since = now if missing_since is None else missing_since
            if now - missing_since >= self._patience_s:
                self._give_up(missing)
                return

    def _give_up(self, missing: str) -> None:
        with self._lock:
            self.lost = f"the Ray cluster is lost: {missing}; go on from the newest checkpoint with --resume"
            following = list(self._open)
        for future in following:
            self._fail(future)
        if not self._left.wait(LEAVE_S):
            print(f"error: {self.lost}", file=sys.stderr, flush=True)
            os._exit(1)

    def _fail(self, future: Future[Any]) -> None:
        with contextlib.suppress(InvalidStateError):  # it was done in the meantime
            future.set_exception(ClusterLost(self.lost))


def watch_cluster() -> ClusterWatch:
    """A watch of the connected cluster: patient with one that others have started, not with one's own."""
    node = ray._private.worker._global_node  # private: Ray tells nobody that its own processes have ended
    if node is None:  # a connection through ray://, which notices by itself
        return ClusterWatch(lambda: "", PATIENCE_S)
    if node.all_processes:
        return ClusterWatch(lambda: _ended(node), 0.0)
    return ClusterWatch(lambda: _silent(node), PATIENCE_S)


def _ended(node: Any) -> str:
    """Which process of a cluster that this process has started has ended."""
    for name, process in node.dead_processes():
        if name in ESSENTIAL:
            code = process.returncode
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return f"its {name} (process {process.pid}) {how}"
    return ""


def _silent(node: Any) -> str:
    """Which process of a cluster of others no longer takes connections."""
    host, _, port = node.gcs_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), LOOK_S).close()
    except OSError as error:
        return f"its GCS at {node.gcs_address} does not answer ({error})"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(LOOK_S)
        try:
            connection.connect(node.raylet_socket_name)
        except OSError as error:
            return f"the raylet of this node does not answer ({error})"
    return ""
