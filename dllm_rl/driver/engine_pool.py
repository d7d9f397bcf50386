"""The driver's view of all engines: work is dealt out in calls of a fixed size, and what a dead engine had is redone.

The calls of a step are the same for any number of engines, and a trajectory is a function of its call: results do not
depend on how many engines there are, which of them was faster, or which of them died.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from dllm_rl.cluster.group import WorkerGroup, WorkerLost
from dllm_rl.cluster.watchdog import HEARTBEAT_S, Watchdog
from dllm_rl.driver.check_answer import AnswerCheck, Asked
from dllm_rl.protocols.engine import NO_WEIGHTS, TRAIN
from dllm_rl.types import Prompt, Sampling, Trajectory
from dllm_rl.workers.engine_worker import EngineWorker
from dllm_rl.workers.packing import PackedTrajectories, pack, unpack

_DEPTH = 2  # calls that an engine holds: the next one is there when it has finished one


class EnginePool:
    """Engines behind one generate().

    Attributes:
        group: the engines.
        weights: the version that all of them hold.
        restarts: engines that were lost and built anew.
        sync_worker: gives a rebuilt engine the current weights and verifies them; set by the sync.
    """

    def __init__(
        self,
        group: WorkerGroup[EngineWorker],
        *,
        rows_per_call: int,
        hang_s: float,
        max_restarts: int,
        sleeps: bool = False,
        check: AnswerCheck | None = None,
        log: Callable[[str], None],
    ) -> None:
        """Take over a group.

        Args:
            group: the engines.
            rows_per_call: completions per call, fewer only where a group of samples is cut off by the end.
            hang_s: an engine that makes no forward for so long is ended.
            max_restarts: how many engines may be lost over the run.
            sleeps: engines share their devices with learners and make room for them.
            check: compares answers with what was asked; None = they are taken as they come.
            log: told when one was lost.
        """
        self.group, self.weights, self.restarts = group, NO_WEIGHTS, 0
        self.sync_worker: Callable[[int], None] = lambda rank: None
        self._rows_per_call, self._max_restarts = rows_per_call, max_restarts
        self._sleeps, self._check, self._log = sleeps, check, log
        self._watch = Watchdog(group, hang_s)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        samples_per_prompt: int = 1,
        partial: Sequence[Trajectory] | None = None,
        **options: Any,
    ) -> list[Trajectory]:
        """Decode on all engines; the options are the others of RolloutEngine.generate.

        An engine whose answer does not fit its request is built anew, and the call is made again, once.

        Raises:
            WorkerLost: more engines were lost than max_restarts.
            RunStopped, UserError: the second answer does not fit either (UserError: a plugin of other people).
        """
        size = max(1, self._rows_per_call // samples_per_prompt)
        begins = range(0, len(prompts), size)
        parts = [prompts[begin : begin + size] for begin in begins]
        options |= {"samples_per_prompt": samples_per_prompt}
        begun: list[Sequence[Trajectory] | None] = [None] * len(parts)
        if partial is not None:
            begun = [partial[begin * samples_per_prompt :][: size * samples_per_prompt] for begin in begins]
        starts = [None if rows is None else pack(rows) for rows in begun]
        waiting, load = deque(range(len(parts))), [0] * self.group.size
        running: dict[Future[Any], tuple[int, int]] = {}
        down: dict[int, WorkerLost] = {}
        answers: deque[tuple[int, int, Any]] = deque()
        found: dict[int, list[Trajectory]] = {}
        doubted: set[int] = set()

        def problem(number: int, rows: Sequence[Trajectory]) -> str:
            if self._check is None:
                return ""
            asked = Asked(
                prompts=parts[number],
                samples_per_prompt=samples_per_prompt,
                sampling=sampling,
                weights=self.weights,
                partial=begun[number],
                max_blocks=options.get("max_blocks"),
                role=options.get("role", TRAIN),
            )
            return self._check(asked, rows)

        while len(found) < len(parts):
            while waiting and (rank := self._next(load, down, len(waiting))) is not None:
                number = waiting.popleft()
                load[rank] += 1
                self._watch.begin(rank)
                work = (parts[number], sampling)
                future = self.group.submit(rank, EngineWorker.generate, *work, partial=starts[number], **options)
                running[future] = (number, rank)
            while answers:  # engines have work meanwhile
                number, rank, answer = answers.popleft()
                rows = unpack(answer) if isinstance(answer, PackedTrajectories) else answer
                wrong = problem(number, rows)
                if not wrong:
                    found[number] = rows
                    continue
                if self._check is not None and number in doubted:
                    raise self._check.error(wrong)
                doubted.add(number)
                waiting.appendleft(number)
                down[rank] = WorkerLost(self.group.name, rank, f"its answer is not what was asked for: {wrong}")
            finished = wait(running, timeout=HEARTBEAT_S, return_when=FIRST_COMPLETED).done
            for future in finished:
                number, rank = running.pop(future)
                load[rank] -= 1
                try:
                    answers.append((number, rank, future.result()))
                except WorkerLost as lost:
                    waiting.appendleft(number)
                    down[rank] = lost
            for rank in [rank for rank in down if not load[rank]]:  # all that it had has come back
                self.replace(down.pop(rank))
            if running and not finished:
                self._watch.look({rank for _, rank in running.values()})
        return [trajectory for number in range(len(parts)) for trajectory in found[number]]

    def _next(self, load: Sequence[int], down: Collection[int], waiting: int) -> int | None:
        """Who gets the next call: an idle engine; while there is enough for all, also one that would be idle soon."""
        most = _DEPTH if waiting >= self.group.size else 1
        able = [rank for rank in range(len(load)) if rank not in down and load[rank] < most]
        return min(able, key=load.__getitem__, default=None)

    @contextmanager
    def asleep(self, timer: Callable[[str], AbstractContextManager[None]]) -> Iterator[None]:
        """Meanwhile the learners have the devices to themselves, if the two share them.

        Args:
            timer: adds up "sleep_s".
        Raises:
            WorkerLost: more engines were lost than max_restarts.
        """
        if not self._sleeps:
            yield
            return
        with timer("sleep_s"):
            self._everyone(EngineWorker.sleep)
        try:
            yield
        finally:
            with timer("sleep_s"):
                self._everyone(EngineWorker.wake)

    def _everyone(self, method: Callable[[EngineWorker], None]) -> None:
        """Call all engines. Who is lost is built anew, which ends awake; the next push equips it with the others."""
        calls = {}
        for rank in range(self.group.size):
            self._watch.begin(rank)
            calls[self.group.submit(rank, method)] = rank
        left = set(calls)
        while left:
            done, left = wait(left, timeout=HEARTBEAT_S, return_when=FIRST_COMPLETED)
            if not done:
                self._watch.look([calls[future] for future in left])
        for future in calls:
            try:
                future.result()
            except WorkerLost as lost:
                self.replace(lost, sync_worker=False)

    def replace(self, lost: WorkerLost, *, sync_worker: bool = True) -> None:
        """Build a lost engine anew.

        Args:
            lost: which.
            sync_worker: give it the weights that the others hold.
        Raises:
            WorkerLost: it is one too many, or not one of the engines.
        """
        while lost.group == self.group.name and self.restarts < self._max_restarts:
            self.restarts += 1
            self._log(f"{lost}; it is built anew, and its prompts are decoded again")
            try:
                self.group.restart([lost.rank])
                if sync_worker:
                    self.sync_worker(lost.rank)
                return
            except WorkerLost as again:
                lost = again
        raise lost
