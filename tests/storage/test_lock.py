"""One process per run folder; whoever is gone holds nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from dllm_rl.errors import UserError
from dllm_rl.storage import lock


def holder(folder, **changes):
    folder.mkdir(exist_ok=True)
    identity = lock._identity() | changes
    (folder / lock.FILE).write_text(json.dumps(identity))


def quiet(text):
    pass


def taken(folder):
    with lock.held(folder, quiet):
        pass


def test_a_second_start_is_refused_by_name(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        holder(tmp_path / "run", pid=other.pid, started=psutil.Process(other.pid).create_time(), user="ann")
        with pytest.raises(UserError, match=f"in use by process {other.pid} of ann on "):
            taken(tmp_path / "run")
    finally:
        other.communicate(b"\n")
    with lock.held(tmp_path / "run", quiet):  # it has ended: nothing to wait for
        pass


def test_the_same_process_is_refused_while_it_holds_the_folder(tmp_path):
    with lock.held(tmp_path / "run", quiet), pytest.raises(UserError, match="in use by process"):
        taken(tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing was written: the folder goes too"


@pytest.mark.parametrize("left", [b"", b"\0\0\0", b'{"pid": 1', b"[]"])
def test_a_lock_without_content_is_nobody_s(tmp_path, left):
    (tmp_path / lock.FILE).write_bytes(left)
    with lock.held(tmp_path, quiet):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()


def test_another_process_with_the_number_of_the_dead_one_holds_nothing(tmp_path):
    holder(tmp_path, pid=os.getppid(), started=1.0)
    said = []
    with lock.held(tmp_path, said.append):
        pass
    assert "which is gone" in said[0]


def test_a_silent_holder_on_another_host_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_S", 0.2)
    holder(tmp_path, host="node-7 pid:[4026531836]")
    said = []
    with lock.held(tmp_path, said.append):
        assert json.loads((tmp_path / lock.FILE).read_text())["host"] == lock._host()
    assert "on node-7" in said[0] and "taken over" in said[-1]


def test_a_living_holder_on_another_host_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_S", 30.0)
    holder(tmp_path, host="node-7 pid:[4026531836]")
    ended = threading.Event()

    def beat():
        while not ended.is_set():
            os.utime(tmp_path / lock.FILE, ns=(time.time_ns(), time.time_ns()))
            ended.wait(0.01)

    living = threading.Thread(target=beat)
    living.start()
    try:
        with pytest.raises(UserError, match=r"in use by process .* on node-7"), lock.held(tmp_path, quiet):
            pass
    finally:
        ended.set()
        living.join()


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    with lock.held(tmp_path, quiet):
        os.utime(tmp_path / lock.FILE, (1, 1))
        until = time.monotonic() + 20
        while (tmp_path / lock.FILE).stat().st_mtime == 1:
            assert time.monotonic() < until
            time.sleep(0.01)
