"""A Ray of one's own: its processes listen on the loopback alone, and answer only those who hold its token."""

from __future__ import annotations

import math
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray

AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@contextmanager
def private_cluster(cpus: float) -> Iterator[Mapping[str, Any]]:
    """Options of ray.init for a cluster that nobody else reaches; to be started, used and ended inside.

    Variables of AUTHENTICATION and INTERFACES that are set already stay as they are, and are obeyed.

    Args:
        cpus: what the run wants; the cluster claims to have as many, so that workers may share cores.
    """
    # Process groups of learners and engines choose an interface by themselves, and would not choose this one.
    wanted = dict.fromkeys((name for name in INTERFACES if name not in os.environ), _loopback())
    constants = ray._private.ray_constants
    with ExitStack() as stack:
        if not any(name in os.environ for name in AUTHENTICATION):
            # Ray's own choice is one token for all clusters of a user, in a file that others may read (mode 644).
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dllm-rl-ray-"))  # mode 700
            token = Path(folder) / "token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32), encoding="ascii")
            wanted |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
            stack.callback(_reread_authentication)  # when the environment is as it was again
        os.environ |= wanted
        for name in wanted:
            stack.callback(os.environ.pop, name, None)
        _reread_authentication()
        # Private: Ray replaces 127.0.0.1 by an address that others reach, except on Windows and macOS, where a cluster
        # is one machine. This is that switch; the variable that sets it is read only when ray is imported.
        stack.callback(setattr, constants, "ENABLE_RAY_CLUSTER", constants.ENABLE_RAY_CLUSTER)
        constants.ENABLE_RAY_CLUSTER = False
        yield {"num_cpus": max(os.cpu_count() or 1, math.ceil(cpus)), "include_dashboard": False}


def _loopback() -> str:
    """Name of the loopback interface, "lo" on Linux."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _reread_authentication() -> None:
    """Forget the mode and the token of an earlier cluster: Ray reads them once per process, and cannot be told anew."""
    raylet = ray._raylet  # private
    reread: Callable[[str], None] = raylet.Config.initialize
    reread("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
