"""SIGTERM, as schedulers send it before they kill: finish the step, save, exit with 0."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM ends nothing; the function that is given tells whether it has come."""
    asked = threading.Event()

    def note(number: int, frame: Any) -> None:
        asked.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
