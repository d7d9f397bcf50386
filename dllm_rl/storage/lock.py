"""One process per run folder: a lock that survives crashes, recognised on this host and on others."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from dllm_rl.errors import UserError
from dllm_rl.storage import files

FILE, GUARD = ".lock", ".lock-guard"
BEAT_S = 10.0  # between two signs of life of the holder
SILENT_S = 35.0  # a holder on another host that gives none for so long is gone; by our own clock, hosts' clocks differ
_mine: set[Path] = set()  # folders that this process holds


@contextmanager
def held(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a run folder inside; it is made, and removed again if nothing was written into it.

    A holder on this host is asked for: its process, and when that started. One on another host (a job that was
    requeued elsewhere) is watched for SILENT_S.

    Args:
        folder: of the run.
        say: told that somebody else's lock is being watched or was taken over.
    Raises:
        UserError: another process holds it.
    """
    path = folder.resolve()
    with files.explained(f"run folder '{folder}' cannot be used", folder):
        folder.mkdir(parents=True, exist_ok=True)
        _take(folder, path, say)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(folder / FILE, ended), name="run-folder-lock", daemon=True)
    _mine.add(path)
    beat.start()
    try:
        yield
    finally:
        _mine.discard(path)
        ended.set()
        beat.join()
        with contextlib.suppress(OSError):
            (folder / FILE).unlink()
        if [entry.name for entry in folder.iterdir()] == [GUARD]:  # nothing was written: a plan that was refused
            with contextlib.suppress(OSError):
                (folder / GUARD).unlink()
                folder.rmdir()


def _take(folder: Path, path: Path, say: Callable[[str], None]) -> None:
    lock = folder / FILE
    while True:
        with _guarded(folder):
            holder = _read(lock)
            if holder is None or (_is_here(holder) and (path not in _mine if _is_us(holder) else not _alive(holder))):
                if holder is not None and not _is_us(holder):
                    say(f"'{folder}' was held by {_name(holder)}, which is gone")
                files.replace(lock, json.dumps(_identity()))
                return
        if _is_here(holder) or not _silent(lock, folder, holder, say):
            raise UserError(f"'{folder}' is in use by {_name(holder)}; wait for it or end it, or set another run.name")
        with _guarded(folder):
            if _read(lock) == holder:  # nobody else has taken it over meanwhile
                files.replace(lock, json.dumps(_identity()))
                say(f"'{folder}' was held by {_name(holder)}, which has given no sign of life: taken over")
                return


def _silent(lock: Path, folder: Path, holder: Mapping[str, Any], say: Callable[[str], None]) -> bool:
    """Whether a holder on another host gives no sign of life while we look."""
    say(f"'{folder}' is held by {_name(holder)}: looking for {SILENT_S:.0f} s whether that is alive")
    before, until = _stamp(lock), time.monotonic() + SILENT_S
    while time.monotonic() < until:
        time.sleep(min(1.0, SILENT_S / 10))
        if _read(lock) is None:
            return True  # it has ended
        if _stamp(lock) != before:
            return False
    return True


def _beat(lock: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with contextlib.suppress(OSError):  # a file system that is away comes back, or the run fails elsewhere
            os.utime(lock)


@contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """Two starts at the same moment look and take one after the other, where the file system has locks."""
    with (folder / GUARD).open("a") as guard:
        with contextlib.suppress(OSError):
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _identity() -> dict[str, Any]:
    with contextlib.suppress(OSError, KeyError):  # no entry for this user id, as in many containers
        return _process() | {"user": getpass.getuser()}
    return _process() | {"user": str(os.getuid())}


def _process() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _host() -> str:
    """The host and its process numbers: those of two containers mean nothing to each other."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _read(lock: Path) -> dict[str, Any] | None:
    """The holder, or None: no lock, or one that a crash of the machine has left without content."""
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return holder if isinstance(holder, dict) and {"host", "pid", "started", "user"} <= holder.keys() else None


def _is_here(holder: Mapping[str, Any]) -> bool:
    return bool(holder["host"] == _host())


def _is_us(holder: Mapping[str, Any]) -> bool:
    return _is_here(holder) and bool(holder["pid"] == os.getpid())


def _alive(holder: Mapping[str, Any]) -> bool:
    """Whether that process still runs; its number may have become another's."""
    try:
        return abs(psutil.Process(int(holder["pid"])).create_time() - float(holder["started"])) < 1.0
    except psutil.NoSuchProcess:
        return False


def _stamp(lock: Path) -> tuple[int, int]:
    with contextlib.suppress(FileNotFoundError):
        return lock.stat().st_mtime_ns, lock.stat().st_ino
    return 0, 0


def _name(holder: Mapping[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(holder["started"])))
    return f"process {holder['pid']} of {holder['user']} on {str(holder['host']).split()[0]}, started {since}"
