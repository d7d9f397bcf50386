"""Ctrl-C, and what schedulers send before they kill: finish the step, save, exit with 0; a second one ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# SIGUSR1 is what Slurm's --signal=B:USR1@600 and others send when the walltime is nearly over.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """Inside, the first such signal ends nothing; the function that is given tells whether one has come.

    The second raises KeyboardInterrupt, whatever the run is doing.
    """
    asked = threading.Event()

    def note(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        text = f"{signal.Signals(number).name}: finishing the step, then saving; once more to stop at once\n"
        os.write(2, text.encode())  # a handler may interrupt a print: nothing buffered here

    before = {number: signal.signal(number, note) for number in SIGNALS if _wanted(number)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wanted(number: signal.Signals) -> bool:
    """Not what the caller has asked to be ignored: nohup ignores SIGHUP, so that a run outlives its terminal."""
    return signal.getsignal(number) is not signal.SIG_IGN
