"""Verifiers in killable processes, each call under a deadline that the parent owns.

A deadline starts when a worker starts on the call, never while it waits in a queue. What fails (raises, hangs, dies)
is a failed verification: the row is excluded from its group, it is never a reward of 0. A call with several rows that
fails is made again with its halves, until the row is found.
"""

from __future__ import annotations

import secrets
import selectors
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch

from dllm_rl import registry
from dllm_rl.config.plugins import configure
from dllm_rl.config.schema import RewardPlugin
from dllm_rl.errors import RunStopped, UserError
from dllm_rl.reward_pool.calls import takes_groups
from dllm_rl.reward_pool.failure import Failure
from dllm_rl.reward_pool.frames import ProtocolError, encode
from dllm_rl.reward_pool.process import START_UP_S, Containment, Worker
from dllm_rl.types import Rewards, RewardStatus

_SEVERITY: tuple[RewardStatus, ...] = ("ok", "invalid", "timeout", "error")
_CHUNK = 32
_Outcome = tuple[int, int, RewardStatus, float | None, str]  # reward, row, status, value, message


class RewardPool:
    """Scores completions with several reward functions in several processes. A context manager.

    Make it in a thread that outlives it: on Linux workers die with the thread that started them.

    Attributes:
        names: the reward functions, in order; the names of the reward components.
        blank_truncated: completions of a batch to learn from that never ended are scored as empty texts.
        weights: theirs in the total reward.
        failures: the latest failed verifications, newest last.
        shown: why rows failed, in the words that the user has read already.
    """

    def __init__(
        self,
        specs: Sequence[RewardPlugin],
        *,
        num_workers: int = 2,
        success: str = "",
        blank_truncated: bool = False,
        max_seconds_per_step: float | None = None,
        limits: Containment | None = None,
    ) -> None:
        """Start the workers; they load their rewards while the caller goes on.

        Args:
            specs: the reward functions; names must differ.
            num_workers: processes.
            success: the reward whose value >= 1 means that a row is solved; "" = none.
            blank_truncated: see the class.
            max_seconds_per_step: for the rows of a step; those that are left then have failed. None = no limit.
            limits: what the workers may use. A reward with ``network: true`` gives all of them a network.
        Raises:
            UserError: an unknown reward, one that is listed twice, or an option that it does not take.
        """
        self.names, self.blank_truncated = tuple(spec.name for spec in specs), blank_truncated
        self.weights = {spec.name: spec.weight for spec in specs}
        for spec in specs:
            if self.names.count(spec.name) > 1:
                raise UserError(f"reward '{spec.name}' is listed twice; give it one entry and one weight")
            configure("rewards", spec.name, spec.options)  # here, so that a typing error costs no model load
        self._together = [takes_groups(registry.load("rewards", spec.name)) for spec in specs]
        self.failures: deque[Failure] = deque(maxlen=20)
        self.shown: set[str] = set()
        self._specs, self._success, self._limits = tuple(specs), success, limits or Containment()
        self._max_seconds, self._spent = max_seconds_per_step, 0.0
        self._step: int | None = None
        self._suspects: set[tuple[int, int]] = set()  # (reward, row) over which a worker has died once
        self._selector = selectors.DefaultSelector()
        self._workers: list[Worker] = []
        for _ in range(num_workers):
            self._workers.append(self._start())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers (only those this pool started)."""
        for worker in self._workers:
            worker.end()
        self._workers = []
        self._selector.close()

    def begin_step(self, step: int | None) -> None:
        """Say which step the next rows belong to; one that begins has max_seconds_per_step. None: no limit."""
        if step != self._step:
            self._step, self._spent = step, 0.0

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        *,
        groups: Sequence[Any] | None = None,
        messages: Sequence[Any] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> Rewards:
        """Score every completion with every reward function.

        Args:
            prompts: one per completion.
            completions: texts.
            columns: further arguments of the reward functions, one value per completion.
            groups: rows of the same value are handed to plain functions together; None = each row by itself.
            messages: the prompts as conversations, None where one is plain text.
            completion_ids: tokens of the completions, for plain functions.
        Returns:
            Rewards; a row with a failed verification is not included.
        Raises:
            UserError: a reward function that cannot be built in a worker, or a column that cannot be handed to one.
            RunStopped: a worker that does not start.
        """
        assert self._workers, "the pool is closed"
        assert all(len(values) == len(completions) for values in columns.values()), "columns align with completions"
        rows = [
            {"prompt": p, "completion": c, "columns": {name: values[i] for name, values in columns.items()}}
            for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]
        more = [
            {"messages": messages and messages[i], "completion_ids": completion_ids and list(completion_ids[i])}
            for i in range(len(rows) if any(self._together) else 0)
        ]
        n = len(rows)
        values = torch.full((len(self._specs), n), float("nan"))
        worst = [0] * n
        reasons = [""] * n
        failed = torch.zeros(n, dtype=torch.bool)
        began = time.monotonic()
        try:
            for reward, row, status, value, message in self._score_rows(rows, more, groups or range(n)):
                worst[row] = max(worst[row], _SEVERITY.index(status))
                if status in ("timeout", "error"):
                    failed[row] = True
                    self.failures.append(Failure(self._specs[reward].name, completions[row], status, message))
                    reasons[row] = reasons[row] or f"reward '{self._specs[reward].name}': {message}"
                elif value is not None:
                    values[reward, row] = value
        finally:  # interrupted: what a worker is still busy with must not answer the next call
            self._spent += time.monotonic() - began
            for worker in [w for w in self._workers if w.calls]:
                self._replace(worker)
        weight = torch.tensor([spec.weight for spec in self._specs])
        total = (weight[:, None] * values.nan_to_num(0.0)).sum(0)
        for row in (~total.isfinite() & ~failed).nonzero().flatten().tolist():  # 3e38 twice
            failed[row], worst[row] = True, _SEVERITY.index("error")
            reasons[row] = "the weighted sum of its rewards is beyond float32; give smaller weights"
            self.failures.append(Failure(" + ".join(self.names), completions[row], "error", reasons[row]))
        solved = torch.zeros(n, dtype=torch.bool)
        if self._success in self.names:
            solved = (values[self.names.index(self._success)] >= 1) & ~failed
        return Rewards(
            components={spec.name: values[i] for i, spec in enumerate(self._specs)},
            total=torch.where(failed, 0.0, total),
            included=~failed,
            solved=solved,
            status=tuple(_SEVERITY[w] for w in worst),
            reasons=tuple(reasons),
        )

    def _score_rows(
        self, rows: Sequence[Mapping[str, Any]], more: Sequence[Mapping[str, Any]], groups: Sequence[Any]
    ) -> Iterator[_Outcome]:
        """What came of every reward and row, in any order."""
        waiting = deque(self._chunks(groups))
        left = {(reward, row) for reward in range(len(self._specs)) for row in range(len(rows))}
        limit = (
            float("inf")
            if self._max_seconds is None or self._step is None
            else time.monotonic() + self._max_seconds - self._spent
        )
        self._suspects = set()
        while left:
            if time.monotonic() >= limit:
                why = f"not scored within reward_pool.max_seconds_per_step = {self._max_seconds:g}"
                yield from ((reward, row, "timeout", None, why) for reward, row in sorted(left))
                return
            for worker in list(self._workers):
                if waiting and worker.ready and not worker.calls and self._hand_over(worker, *waiting[0], rows, more):
                    waiting.popleft()
            for outcome in self._wait(limit, waiting):
                left.discard(outcome[:2])
                yield outcome

    def _chunks(self, groups: Sequence[Any]) -> Iterator[tuple[int, list[list[int]]]]:
        """(reward, its calls) for a worker to do at a time."""
        size = max(1, min(_CHUNK, -(-len(groups) // (2 * len(self._workers)))))
        together: dict[Any, list[int]] = {}
        for row, group in enumerate(groups):
            together.setdefault(group, []).append(row)
        for reward, whole in enumerate(self._together):
            chunk: list[list[int]] = []
            for call in together.values() if whole else ([row] for row in range(len(groups))):
                chunk.append(call)
                if sum(map(len, chunk)) >= size:
                    yield reward, chunk
                    chunk = []
            if chunk:
                yield reward, chunk

    def _wait(self, limit: float, waiting: deque[tuple[int, list[list[int]]]]) -> list[_Outcome]:
        """What came of the calls of which there is news; what must be done again is put before what waits."""
        pending = [w for w in self._workers if w.calls or not w.ready]
        for worker in pending:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.sending else 0)
            if self._selector.get_key(worker.socket).events != events:
                self._selector.modify(worker.socket, events, worker)
        timeout = max(0.0, min(limit, *(w.deadline for w in pending)) - time.monotonic())
        outcomes: list[_Outcome] = []
        idle = True
        for key, events in self._selector.select(timeout):
            worker = key.data
            if worker not in pending:  # idle, and speaks: it is found out when it is handed rows
                continue
            idle = False
            if events & selectors.EVENT_WRITE:
                worker.send()
            if events & selectors.EVENT_READ:
                outcomes += self._hear(worker, waiting)
        if idle and len(pending) < len(self._workers):
            self._drop_talkers(pending)
        for worker in pending:
            if worker in self._workers and time.monotonic() >= worker.deadline and (worker.calls or not worker.ready):
                if not worker.ready:
                    raise RunStopped(f"a reward worker did not start within {START_UP_S:.0f} s; its messages are above")
                seconds = self._specs[worker.reward].timeout_s
                outcomes += self._lost(worker, waiting, "timeout", f"no verdict within {seconds} s")
        return outcomes

    def _drop_talkers(self, pending: Sequence[Worker]) -> None:
        """Replace idle workers that say something: select would return at once for ever."""
        for worker in [w for w in self._workers if w not in pending]:
            try:
                spoke = bool(worker.hear())
            except (EOFError, ProtocolError):
                spoke = True
            if spoke:
                self._replace(worker)

    def _hand_over(
        self,
        worker: Worker,
        reward: int,
        calls: list[list[int]],
        rows: Sequence[Mapping[str, Any]],
        more: Sequence[Mapping[str, Any]],
    ) -> bool:
        """Whether the worker took the calls; one that died while it was idle is replaced, and no row has failed."""
        nonce, timeout_s = secrets.token_hex(8), self._specs[reward].timeout_s
        given = [
            [{**rows[row], **more[row]} if self._together[reward] else rows[row] for row in call] for call in calls
        ]
        request = {"nonce": nonce, "reward": reward, "step": self._step or 0, "timeout_s": timeout_s, "calls": given}
        try:
            frame = encode(request)
        except (TypeError, ValueError, ProtocolError) as error:
            raise _unsendable(rows, error) from None
        worker.deadline = time.monotonic() + timeout_s * len(calls[0])
        try:
            worker.ask(reward, calls, frame, nonce)
        except (EOFError, ProtocolError):
            worker.calls.clear()
            self._replace(worker)
            return False
        return True

    def _hear(self, worker: Worker, waiting: deque[tuple[int, list[list[int]]]]) -> list[_Outcome]:
        outcomes: list[_Outcome] = []
        try:
            for message in worker.hear():
                if not worker.ready:
                    outcome = message if isinstance(message, dict) else {}
                    if "refused" in outcome:
                        raise UserError(" ".join(str(outcome["refused"]).split()))
                    if outcome != {"ready": True}:
                        raise ProtocolError("it did not say that it is ready")
                    worker.ready = True
                    continue
                call, results = worker.results(message)
                for row, (status, value, text) in zip(call, results, strict=False):
                    if status == "raised":
                        outcomes += self._charge(waiting, worker.reward, call, "error", text)
                        break
                    outcomes.append((worker.reward, row, status, value, text))  # type: ignore[arg-type]
                if worker.calls:  # it is on its next call now
                    worker.deadline = time.monotonic() + self._specs[worker.reward].timeout_s * len(worker.calls[0])
        except ProtocolError as error:
            if not worker.ready:
                raise RunStopped(f"a reward worker broke off at start-up: {error}") from None
            text = f"the verifier broke the protocol of replies: {error}"
            outcomes += self._lost(worker, waiting, "error", text, again=True)
        except EOFError:
            how = worker.how_it_ended()
            if not worker.ready:
                raise RunStopped(f"a reward worker ended at start-up with {how}; its messages are above") from None
            text = f"the verifier ended its process ({how})"
            outcomes += self._lost(worker, waiting, "error", text, again=True)
        return outcomes

    def _lost(
        self,
        worker: Worker,
        waiting: deque[tuple[int, list[list[int]]]],
        status: RewardStatus,
        message: str,
        *,
        again: bool = False,
    ) -> list[_Outcome]:
        """Replace a worker; its call in work is charged, the others wait again."""
        self._replace(worker)
        if not worker.calls:
            return []
        call, *others = worker.calls
        if others:
            waiting.appendleft((worker.reward, others))
        suspect = (worker.reward, call[0])
        if (
            again and len(call) == 1 and suspect not in self._suspects
        ):  # it may have been killed from outside, or by the row before
            self._suspects.add(suspect)
            waiting.appendleft((worker.reward, [call]))
            return []
        return self._charge(waiting, worker.reward, call, status, message)

    def _charge(
        self,
        waiting: deque[tuple[int, list[list[int]]]],
        reward: int,
        call: list[int],
        status: RewardStatus,
        message: str,
    ) -> list[_Outcome]:
        """The row that failed; a call of several is halved instead."""
        if len(call) == 1:
            return [(reward, call[0], status, None, message)]
        half = len(call) // 2
        waiting.extendleft([(reward, [call[half:]]), (reward, [call[:half]])])
        return []

    def _start(self) -> Worker:
        worker = Worker(self._specs, self._limits)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        return worker

    def _replace(self, worker: Worker) -> None:
        if worker.socket.fileno() >= 0:
            self._selector.unregister(worker.socket)
        worker.end()
        self._workers[self._workers.index(worker)] = self._start()


def _unsendable(rows: Sequence[Mapping[str, Any]], error: Exception) -> UserError:
    """Name the column that JSON cannot hold."""
    for name in rows[0]["columns"]:
        try:
            encode([row["columns"][name] for row in rows])
        except (TypeError, ValueError, ProtocolError) as found:
            return UserError(f"data column '{name}' cannot be handed to reward functions: {found}; convert or drop it")
    return UserError(f"the rows cannot be handed to reward functions: {error}")
