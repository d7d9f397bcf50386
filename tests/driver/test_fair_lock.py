"""Nobody waits for the engines longer than one turn of somebody else."""

from __future__ import annotations

import time
from threading import Event, Lock, Thread

from dllm_rl.driver.fair_lock import FairLock


class Barging:
    """A lock as unfair as threading.Lock may be: whoever had to wait looks again now and then."""

    def __init__(self):
        self._lock = Lock()

    def acquire(self):
        while not self._lock.acquire(blocking=False):
            time.sleep(0.005)

    def release(self):
        self._lock.release()

    def __enter__(self):
        self.acquire()

    def __exit__(self, *error):
        self.release()


def test_who_waits_is_next(monkeypatch):
    monkeypatch.setattr("dllm_rl.driver.fair_lock.Lock", Barging)
    lock, working, turns = FairLock(), Event(), []

    def decode():  # asks again at once, as decoding does
        for _ in range(60):
            with lock:
                turns.append(None)
                working.set()
                time.sleep(0.002)

    thread = Thread(target=decode)
    thread.start()
    assert working.wait(10)
    before = len(turns)
    with lock:
        waited = len(turns) - before
    thread.join()
    assert waited <= 1, f"a push waited for {waited} turns of decoding"


def test_one_works_at_a_time():
    lock, inside, most = FairLock(), [], []

    def work():
        for _ in range(20):
            with lock:
                inside.append(None)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1


def test_an_error_releases_it():
    lock = FairLock()
    for _ in range(2):
        try:
            with lock:
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
