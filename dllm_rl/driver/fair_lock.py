"""A lock that goes to whoever waits for it, not back to whoever has just released it."""

from __future__ import annotations

from threading import Lock


class FairLock:
    """Held by one thread at a time, in turns. A context manager; not to be entered twice by one thread."""

    def __init__(self) -> None:
        # Whoever works holds this one. Without it the learner would push weights into engines in the middle of a
        # forward, and a completion would be decoded with halves of two models.
        self._held = Lock()
        # Whoever is next holds this one while it waits for the other. Without it a push would starve: the decoding
        # thread asks again at once after each piece of work, and a plain Lock goes to whoever runs, not to whoever has
        # waited. Now it must queue here first, behind the push.
        self._next = Lock()

    def __enter__(self) -> None:
        with self._next:
            self._held.acquire()

    def __exit__(self, *error: object) -> None:
        self._held.release()
