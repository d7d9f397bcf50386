"""Verifiers in killable processes, each completion under a deadline that the parent owns.

A deadline starts when a worker starts on the completion, never while it waits in a queue. What fails (raises, hangs,
dies) is a failed verification: the row is excluded from its group, it is never a reward of 0.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import torch

from dllm_rl.config.plugins import configure
from dllm_rl.config.schema import RewardPlugin
from dllm_rl.errors import RunStopped, UserError
from dllm_rl.types import Rewards, RewardStatus

START_UP_S = 120.0  # importing sympy on a loaded machine takes seconds
_SEVERITY: tuple[RewardStatus, ...] = ("ok", "invalid", "timeout", "error")
_CHUNK = 32


@dataclass(frozen=True, slots=True)
class Failure:
    """A verification that failed."""

    reward: str
    completion: str
    status: RewardStatus
    message: str

    def __str__(self) -> str:
        return f"reward '{self.reward}': {self.message} (completion {self.completion[:60]!r})"


class _Worker:
    """One process, and the rows that it still has to score; the first of them is the one in work."""

    def __init__(self, specs: Sequence[RewardPlugin]) -> None:
        child_in, to_child = os.pipe()
        from_child, child_out = os.pipe()
        self.process = subprocess.Popen(
            # -P: our own path in its order; the current directory must not shadow what the parent imported.
            [sys.executable, "-P", "-m", "dllm_rl.reward_pool.worker", *map(str, (child_in, child_out, os.getpid()))],
            pass_fds=(child_in, child_out),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=2,  # a verifier's prints join its warnings
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
        )
        os.close(child_in)
        os.close(child_out)
        self.replies = Connection(from_child, writable=False)
        self.requests = Connection(to_child, readable=False)
        self.requests.send([(spec.name, spec.options) for spec in specs])
        self.ready = False
        self.reward = 0  # which reward function the rows are for
        self.rows: deque[int] = deque()
        self.deadline = time.monotonic() + START_UP_S

    def end(self) -> int:
        """Kill the process and whatever it started; returns its exit code."""
        if self.process.returncode is None:  # not reaped: its number, which is its group's, cannot be anybody else's
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses to signal the dead
                os.killpg(self.process.pid, signal.SIGKILL)
        self.replies.close()
        self.requests.close()
        return self.process.wait()


class RewardPool:
    """Scores completions with several reward functions in several processes. A context manager.

    Make it in a thread that outlives it: on Linux workers die with the thread that started them.

    Attributes:
        names: the reward functions, in order; the names of the reward components.
        blank_truncated: completions of a batch to learn from that never ended are scored as empty texts.
        weights: theirs in the total reward.
        failures: the latest failed verifications, newest last.
    """

    def __init__(
        self,
        specs: Sequence[RewardPlugin],
        *,
        num_workers: int = 2,
        success: str = "",
        blank_truncated: bool = False,
    ) -> None:
        """Start the workers; they load their rewards while the caller goes on.

        Args:
            specs: the reward functions; names must differ.
            num_workers: processes.
            success: the reward whose value >= 1 means that a row is solved; "" = none.
            blank_truncated: see the class.
        Raises:
            UserError: an unknown reward, one that is listed twice, or an option that it does not take.
        """
        self.names, self.blank_truncated = tuple(spec.name for spec in specs), blank_truncated
        self.weights = {spec.name: spec.weight for spec in specs}
        for spec in specs:
            if self.names.count(spec.name) > 1:
                raise UserError(f"reward '{spec.name}' is listed twice; give it one entry and one weight")
            configure("rewards", spec.name, spec.options)  # here, so that a typing error costs no model load
        self.failures: deque[Failure] = deque(maxlen=20)
        self._specs, self._success = tuple(specs), success
        self._suspects: set[tuple[int, int]] = set()  # (reward, row) over which a worker has died once
        self._workers = [_Worker(self._specs) for _ in range(num_workers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers (only those this pool started)."""
        for worker in self._workers:
            worker.end()
        self._workers = []

    def score(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Rewards:
        """Score every completion with every reward function.

        Args:
            prompts: one per completion.
            completions: texts.
            columns: further arguments of the reward functions, one value per completion.
        Returns:
            Rewards; a row with a failed verification is not included.
        Raises:
            UserError: a reward function that cannot be built in a worker.
            RunStopped: a worker that does not start.
        """
        assert self._workers, "the pool is closed"
        assert all(len(values) == len(completions) for values in columns.values()), "columns align with completions"
        rows = [
            {"prompt": p, "completion": c, "columns": {name: values[i] for name, values in columns.items()}}
            for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]
        n = len(rows)
        values = torch.full((len(self._specs), n), float("nan"))
        worst = [0] * n
        failed = torch.zeros(n, dtype=torch.bool)
        try:
            for reward, row, status, value, message in self._score_rows(rows):
                worst[row] = max(worst[row], _SEVERITY.index(status))
                if status in ("timeout", "error"):
                    failed[row] = True
                    self.failures.append(Failure(self._specs[reward].name, completions[row], status, message))
                elif value is not None:
                    values[reward, row] = value
        finally:  # interrupted: what a worker is still busy with must not answer the next call
            for worker in [w for w in self._workers if w.rows]:
                self._replace(worker)
        weight = torch.tensor([spec.weight for spec in self._specs])
        solved = torch.zeros(n, dtype=torch.bool)
        if self._success in self.names:
            solved = (values[self.names.index(self._success)] >= 1) & ~failed
        return Rewards(
            components={spec.name: values[i] for i, spec in enumerate(self._specs)},
            total=torch.where(failed, 0.0, (weight[:, None] * values.nan_to_num(0.0)).sum(0)),
            included=~failed,
            solved=solved,
            status=tuple(_SEVERITY[w] for w in worst),
        )

    def _score_rows(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, int, RewardStatus, float | None, str]]:
        """(reward, row, status, value, message) of every pair, in any order."""
        size = max(1, min(_CHUNK, -(-len(rows) // (2 * len(self._workers)))))
        waiting: deque[tuple[int, list[int]]] = deque(
            (reward, list(range(begin, min(begin + size, len(rows)))))
            for reward in range(len(self._specs))
            for begin in range(0, len(rows), size)
        )
        left = len(rows) * len(self._specs)
        self._suspects = set()
        while left:
            for worker in list(self._workers):
                if waiting and worker.ready and not worker.rows and self._hand_over(worker, *waiting[0], rows):
                    waiting.popleft()
            pending = [w for w in self._workers if w.rows or not w.ready]
            timeout = max(0.0, min(w.deadline for w in pending) - time.monotonic())
            heard = wait([w.replies for w in pending], timeout)
            for worker in pending:
                if worker.replies in heard:
                    result = self._hear(worker)
                elif time.monotonic() >= worker.deadline:
                    result = self._overrun(worker)
                else:
                    continue
                if worker not in self._workers and worker.rows:  # it was ended: the rows it has not scored wait again
                    waiting.appendleft((worker.reward, list(worker.rows)))
                if result is None:
                    continue
                left -= 1
                yield (worker.reward, *result)

    def _hand_over(self, worker: _Worker, reward: int, chunk: list[int], rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the worker took the chunk; one that died while it was idle is replaced, and no row has failed."""
        # Before they are sent: whoever is interrupted in between ends the workers that have rows, and no other.
        worker.reward, worker.rows = reward, deque(chunk)
        worker.deadline = time.monotonic() + self._specs[reward].timeout_s
        try:
            worker.requests.send((reward, [(row, rows[row]) for row in chunk]))
        except BrokenPipeError:
            worker.rows.clear()
            self._replace(worker)
            return False
        return True

    def _hear(self, worker: _Worker) -> tuple[int, RewardStatus, float | None, str] | None:
        """The next result of a worker; None if it only became ready, or died over a row that gets a second chance."""
        try:
            message = worker.replies.recv()
        except (EOFError, ConnectionResetError):
            return self._died(worker)
        if not worker.ready:
            if message[0] == "refused":
                raise UserError(message[1])
            worker.ready = True
            return None
        row, status, value, text = message
        assert row == worker.rows.popleft(), "results come in the order of the chunk"
        worker.deadline = time.monotonic() + self._specs[worker.reward].timeout_s  # it is on its next row now
        return row, status, value, text

    def _overrun(self, worker: _Worker) -> tuple[int, RewardStatus, float | None, str]:
        if not worker.ready:
            raise RunStopped(f"a reward worker did not start within {START_UP_S:.0f} s; its messages are above")
        self._replace(worker)
        return worker.rows.popleft(), "timeout", None, f"no verdict within {self._specs[worker.reward].timeout_s} s"

    def _died(self, worker: _Worker) -> tuple[int, RewardStatus, float | None, str] | None:
        code = worker.end()
        if not worker.ready:
            raise RunStopped(f"a reward worker ended at start-up with exit code {code}; its messages are above")
        self._replace(worker)
        if (
            worker.reward,
            worker.rows[0],
        ) not in self._suspects:  # it may have been killed from outside, for memory say
            self._suspects.add((worker.reward, worker.rows[0]))
            return None
        return worker.rows.popleft(), "error", None, f"the verifier ended its process (exit code {code})"

    def _replace(self, worker: _Worker) -> None:
        worker.end()
        self._workers[self._workers.index(worker)] = _Worker(self._specs)
