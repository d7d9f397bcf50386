"""The process that runs verifiers. Started by RewardPool; talks over a pipe of its own, so prints cannot corrupt it.

Torch-free on purpose: a worker that was killed must be back in a moment.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from dllm_rl.config.plugins import build

_PR_SET_PDEATHSIG = 1


def _die_with_parent(parent: int) -> None:
    """A verifier that never returns must not outlive the run (Linux; elsewhere the closed pipe ends idle workers)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _judge_one(reward: Callable[..., Sequence[Any]], row: dict[str, Any]) -> tuple[str, float | None, str]:
    """(status, value, message) of one completion."""
    try:
        columns = {name: [value] for name, value in row["columns"].items()}
        values = reward([row["prompt"]], [row["completion"]], **columns)
        if len(values) != 1:
            return "error", None, f"returned {len(values)} values for 1 completion"
        value = values[0]
        if value is None:
            return "ok", None, ""
        number = float(value)
    except Exception as error:  # noqa: BLE001 - whatever a verifier raises is its verdict on itself: failed, not zero
        return "error", None, f"{type(error).__name__}: {error}"[:500]
    if not math.isfinite(number):
        return "error", None, f"returned {number}"
    return getattr(value, "status", "ok"), number, ""


def main(read: int, write: int, parent: int) -> None:
    """Serve chunks until the pipe closes.

    Messages in: first a list of (name, options); then chunks (reward index, [(row number, row), ...]).
    Messages out: ("ready", None) or ("refused", why); then (row number, status, value, message) per row, in order.
    """
    _die_with_parent(parent)
    inbox, outbox = Connection(read, writable=False), Connection(write, readable=False)
    try:
        rewards = [build("rewards", name, options) for name, options in inbox.recv()]
    except (ValueError, ImportError) as error:
        outbox.send(("refused", str(error)))
        return
    outbox.send(("ready", None))
    while True:
        try:
            index, chunk = inbox.recv()
        except EOFError:
            return
        for number, row in chunk:
            outbox.send((number, *_judge_one(rewards[index], row)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
