"""Where processes of a collective group meet: on the interface in use alone, under a key that others do not know."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist


def keyed_store(host: str, port: int, key: str, *, leads: bool, timeout_s: float) -> tuple[dist.Store, int]:
    """A store of torch.distributed, and the port on which it can be reached.

    Who does not know the key writes and reads beside the group, and cannot take a place in it.

    Args:
        host: of the process that leads; its store listens on this address.
        port: there; 0 lets the process that leads take a free one.
        key: the same in all processes; its owner makes it with secrets.token_hex.
        leads: this process holds the store, the others connect to it.
        timeout_s: for connecting and for each question.
    """
    assert key, "a group without a key is open to everybody"
    timeout, held = timedelta(seconds=timeout_s), None
    if leads:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
        port = listener.getsockname()[1]
        held = listener.detach()  # torch itself would listen on every interface
    store = dist.TCPStore(host, port, is_master=leads, wait_for_workers=False, timeout=timeout, master_listen_fd=held)
    return dist.PrefixStore(key, store), port
