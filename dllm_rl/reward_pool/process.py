"""The pool's end of a worker: what it was asked, what it has answered, and its end."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from dllm_rl.config.schema import RewardPlugin
from dllm_rl.reward_pool import containment
from dllm_rl.reward_pool.calls import MAX_MESSAGE, Result
from dllm_rl.reward_pool.frames import MAX_REPLY, Inbox, ProtocolError, encode
from dllm_rl.types import RewardStatus

START_UP_S = 120.0  # importing sympy on a loaded machine takes seconds
_GRACE_S = 0.5  # for a supervisor to end what its worker started


@dataclass(frozen=True, slots=True)
class Containment:
    """How workers are contained; see configuration section reward_pool."""

    environment: tuple[str, ...] = ()
    memory_gb: float | None = 8.0
    network: bool = False


class Worker:
    """One worker, and the calls that it still has to answer; the first of them is the one in work.

    Nothing here waits for the worker: what a stopped one does not read stays in ``_unsent``.
    """

    def __init__(self, specs: Sequence[RewardPlugin], limits: Containment) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        self.mark = secrets.token_hex(8)
        self._folder = tempfile.mkdtemp(prefix="dllm-rl-reward-")
        self._namespaces = containment.namespaces_available()
        flags = (self._namespaces, limits.network)
        arguments = [str(theirs.fileno()), str(os.getpid()), self._folder, *(str(int(flag)) for flag in flags)]
        self.process = subprocess.Popen(
            # -P: our own path in its order; the current directory must not shadow what the parent imported.
            [sys.executable, "-P", "-m", "dllm_rl.reward_pool.worker", *arguments],
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=2,  # a verifier's prints join its warnings
            env=containment.environment(limits.environment, self._folder, self.mark),
        )
        theirs.close()
        self._inbox, self._unsent = Inbox(MAX_REPLY), bytearray()
        self._queue({"specs": [[spec.name, spec.options] for spec in specs], "memory_gb": limits.memory_gb})
        self.ready = False
        self.reward = 0  # which reward function the calls are for
        self.calls: deque[list[int]] = deque()  # rows of each
        self.deadline = time.monotonic() + START_UP_S
        self._nonce, self._answered = "", 0

    @property
    def sending(self) -> bool:
        """Whether part of a request has not been taken yet."""
        return bool(self._unsent)

    def ask(self, reward: int, calls: Sequence[list[int]], request: bytes, nonce: str) -> None:
        """Hand over calls, which it must not have any of.

        Raises:
            ProtocolError: it has said something unasked, or has died.
        """
        # Before anything is sent: whoever is interrupted in between ends the workers that have calls, and no other.
        self.reward, self.calls, self._nonce, self._answered = reward, deque(calls), nonce, 0
        if self.hear() or len(self._inbox):
            raise ProtocolError("it spoke unasked")
        self._unsent += request
        self.send()

    def _queue(self, message: Any) -> None:
        self._unsent += encode(message)
        self.send()

    def send(self) -> None:
        """Send what it takes without waiting."""
        try:
            while self._unsent:
                del self._unsent[: self.socket.send(self._unsent[: 1 << 16])]
        except BlockingIOError:
            pass
        except OSError:  # it is dead: reading says so
            self._unsent.clear()

    def hear(self) -> list[Any]:
        """The messages that have arrived.

        Raises:
            ProtocolError: it broke the protocol.
            EOFError: it has closed the channel.
        """
        try:
            data = self.socket.recv(1 << 20)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            raise EOFError
        return list(self._inbox.feed(data))

    def results(self, message: Any) -> tuple[list[int], list[Result]]:
        """The rows of the call in work and what a message says of them, which takes the call from the worker.

        Raises:
            ProtocolError: the message is not the answer to this call.
        """
        expected = {"nonce": self._nonce, "call": self._answered}
        if not self.calls or not isinstance(message, dict) or {**message, **expected} != message:
            raise ProtocolError("an answer to another question")
        rows, given = self.calls[0], message.get("results")
        if not isinstance(given, list):
            raise ProtocolError("an answer without results")
        results = [_checked(one) for one in given]
        if len(results) != len(rows) and [status for status, _, _ in results] != ["raised"]:
            raise ProtocolError(f"{len(results)} results for {len(rows)} rows")
        self.calls.popleft()
        self._answered += 1
        return rows, results

    def end(self) -> None:
        """Kill the worker and whatever it started."""
        self.socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.terminate()
            self.process.wait(_GRACE_S)
        if self.process.returncode is None:  # the supervisor was stopped, or cannot keep up
            self.process.kill()
        self.process.wait()
        if not self._namespaces:
            containment.end_marked(self.mark)
        if os.path.exists(self._folder):
            containment.remove_folder(self._folder)

    def how_it_ended(self) -> str:
        """Its exit code, minus the signal that ended it; a worker may also have closed the channel alone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(_GRACE_S)
            return f"exit code {128 - code if code > 128 else code}"
        return "it closed its channel"


def _checked(result: Any) -> Result:
    """A result of which nothing can break what it is put into: float32 tensors, logs, terminals."""
    if not isinstance(result, list) or len(result) != 3:
        raise ProtocolError("a result that is not status, value, message")
    status, value, message = result
    if status not in (*get_args(RewardStatus), "raised") or not isinstance(message, str):
        raise ProtocolError("a result of unknown status")
    if value is not None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ProtocolError("a value that is not a number")
        try:
            (value,) = struct.unpack("<f", struct.pack("<f", value))
        except (OverflowError, struct.error):
            raise ProtocolError("a value beyond float32") from None
        if value != value or value in (float("inf"), float("-inf")):
            raise ProtocolError("a value that is not finite")
    text = "".join(c if c.isprintable() else " " for c in message[: 3 * MAX_MESSAGE])
    return status, value, text
