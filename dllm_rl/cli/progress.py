"""Progress on the terminal: bars with ETA where there is one, a plain line now and then where there is not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dllm_rl.reports.progress import Advance

PLAIN_EVERY_S = 10.0  # a log file of a long run must not fill with progress


class RichProgress:
    """Shows phases on stderr."""

    def __init__(self, console: Console) -> None:
        """Hold the console.

        Args:
            console: of stderr.
        """
        self._console = console

    def log(self, text: str) -> None:
        """One line for the user."""
        self._console.print(text, highlight=False)

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:
        """A phase of total units."""
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description:>12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=self._console, transient=True) as bars:
                task = bars.add_task(label, total=total, note="")

                def advance(done: int, note: str) -> None:
                    bars.update(task, advance=done, note=note)

                yield advance
        else:
            yield self._plain(label, total)

    def _plain(self, label: str, total: int) -> Advance:
        started = last = time.monotonic()
        finished = offset = 0

        def advance(done: int, note: str) -> None:
            nonlocal finished, last, offset
            finished += done
            if not note and finished == done:
                offset = done  # units that an earlier run had finished: not part of this run's pace
            now = time.monotonic()
            if now - last >= PLAIN_EVERY_S:
                last = now
                left = (now - started) / max(1, finished - offset) * (total - finished)
                self._console.print(f"{label} {finished}/{total}, eta {left:.0f} s {note}".rstrip(), highlight=False)

        return advance
