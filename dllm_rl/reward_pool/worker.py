"""The process that runs verifiers. Started by RewardPool; talks over a pipe of its own, so prints cannot corrupt it.

Torch-free on purpose: a worker that was killed must be back in a moment.
"""

from __future__ import annotations

import ctypes
import math
import numbers
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from dllm_rl.config.plugins import build
from dllm_rl.errors import UserError

_PR_SET_PDEATHSIG = 1
MAX_MESSAGE = 500  # characters of an exception that travel to the parent


def _die_with_parent(parent: int) -> None:
    """A verifier that never returns must not outlive the run (Linux; elsewhere the closed pipe ends idle workers)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _score_one(reward: Callable[..., Sequence[Any]], row: dict[str, Any]) -> tuple[str, float | None, str]:
    """(status, value, message) of one completion."""
    columns = {name: [value] for name, value in row["columns"].items()}
    try:
        returned: Any = reward([row["prompt"]], [row["completion"]], **columns)
        values = list(returned) if isinstance(returned, Iterable) else []
    except BaseException as error:  # whatever it raises, SystemExit too, means that it failed, not 0
        return "error", None, f"__call__() raised {type(error).__name__}: {error}"[:MAX_MESSAGE]
    value = values[0] if len(values) == 1 else math.nan
    if value is None:
        return "ok", None, ""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        wanted = "one finite number or None per completion"
        return "error", None, f"__call__() must return {wanted}, returned {returned!r:.100} for one"
    return ("invalid" if getattr(value, "status", "ok") == "invalid" else "ok"), float(value), ""


def main(read: int, write: int, parent: int) -> None:
    """Serve chunks until the pipe closes.

    Messages in: first a list of (name, options); then chunks (reward index, [(row number, row), ...]).
    Messages out: ("ready", None) or ("refused", why); then (row number, status, value, message) per row, in order.
    """
    _die_with_parent(parent)
    for descriptor in (read, write):
        os.set_inheritable(descriptor, False)  # a verifier's own children must not hold the pipe open
    replies, requests = Connection(read, writable=False), Connection(write, readable=False)
    try:
        rewards = [build("rewards", name, options) for name, options in replies.recv()]
    except UserError as error:
        requests.send(("refused", str(error)))
        return
    requests.send(("ready", None))
    while True:
        try:
            index, chunk = replies.recv()
        except EOFError:
            return
        for number, row in chunk:
            requests.send((number, *_score_one(rewards[index], row)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
