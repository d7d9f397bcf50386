"""The process that runs verifiers. Started by RewardPool; talks over a socket of its own, so prints cannot corrupt it.

Torch-free on purpose: a worker that was killed must be back in a moment.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

from dllm_rl import registry
from dllm_rl.config.plugins import build
from dllm_rl.errors import UserError
from dllm_rl.reward_pool import containment
from dllm_rl.reward_pool.calls import Caller, takes_groups
from dllm_rl.reward_pool.frames import MAX_REQUEST, Inbox, encode

_SIGNALS = [int(n) for n in signal.valid_signals() if n not in (signal.SIGKILL, signal.SIGSTOP)]
# Held here, so that a verifier which replaces a function of a module does not reach this loop; of _signal, because
# signal makes an enumeration member of each result, which takes longer than many a verdict.
_alarm, _getsignal, _setsignal, _chdir = _signal.setitimer, _signal.getsignal, _signal.signal, os.chdir


def serve(channel: socket.socket) -> None:
    """Answer requests until the pool closes the channel.

    Requests: first {"specs": [[name, options], ...], "memory_gb": ...}, then {"nonce", "reward", "step", "timeout_s",
    "calls": [[row, ...], ...]}. Replies: {"ready": true} or {"refused": why}; then, for each call in order, {"nonce",
    "call": number, "results": [[status, value, message], ...]}, or one result of status "raised" for all its rows.
    """
    channel.set_inheritable(False)  # a verifier's own children must not hold the channel open
    requests = _requests(channel)
    first = next(requests)
    containment.limit_resources(first["memory_gb"])
    try:
        rewards = [
            Caller(build("rewards", name, options), group=takes_groups(registry.load("rewards", name)))
            for name, options in first["specs"]
        ]
    except UserError as error:
        channel.sendall(encode({"refused": str(error)}))
        return
    channel.sendall(encode({"ready": True}))
    folder, send, pack = os.getcwd(), channel.sendall, encode
    handlers = [(number, _signal.getsignal(number)) for number in _SIGNALS]
    for request in requests:
        reward, nonce, step = rewards[request["reward"]], request["nonce"], request["step"]
        containment.limit_cpu(request["timeout_s"] * sum(map(len, request["calls"])))
        for number, rows in enumerate(request["calls"]):
            results = reward(rows, step)
            _reset(handlers, folder)
            send(pack({"nonce": nonce, "call": number, "results": results}))


def _requests(channel: socket.socket) -> Iterator[Any]:
    inbox = Inbox(MAX_REQUEST)
    while data := channel.recv(1 << 20):
        yield from inbox.feed(data)


def _reset(handlers: list[tuple[int, Any]], folder: str) -> None:
    """Take back what a row has set for the rows after it: an alarm, signal handlers, the current directory."""
    _alarm(signal.ITIMER_REAL, 0)
    for number, handler in handlers:
        if _getsignal(number) is not handler:
            _setsignal(number, handler)
    _chdir(folder)


def main(channel: int, parent: int, folder: str, namespaces: str, network: str) -> int:
    """Supervise a process that serves the channel."""
    return containment.supervise(
        lambda: serve(socket.socket(fileno=channel)),
        channel=channel,
        parent=parent,
        folder=folder,
        namespaces=namespaces == "1",
        network=network == "1",
    )


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]))
