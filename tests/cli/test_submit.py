"""dllm-rl submit against a head node that these tests start, and end by its process number."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dllm_rl.cli import submit
from dllm_rl.cli.main import main
from dllm_rl.reports.run_folder import read_rows

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny_sudoku_ray.yaml"


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def head():
    """The address of a dashboard."""
    from ray.job_submission import JobSubmissionClient

    port, dashboard, agent, metrics = free_ports(4)
    binaries = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": binaries + os.pathsep + os.environ["PATH"],
        "RAY_AUTH_MODE": "disabled",
        "DS_ACCELERATOR": "cpu",
    }
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [
            *(str(Path(binaries) / "ray"), "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1"),
            *(f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", "--disable-usage-stats"),
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, "ray start ended"
            try:
                JobSubmissionClient(address).list_jobs()
                break
            except Exception:  # not up yet; its errors have no common type
                assert time.monotonic() < deadline, "the dashboard does not answer"
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()  # --block ends what it has started
        try:
            process.wait(60)
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.returncode is None else None


@pytest.fixture
def folder(tmp_path):
    """A working directory with a configuration."""
    root = tmp_path / "work"
    root.mkdir()
    shutil.copy(CONFIG, root / "run.yaml")
    return root


def arguments(head, folder, *overrides):
    quick = ("run.steps=2", "evaluate.at_end=false", f"run.output={folder.parent / 'runs'}")
    return ["submit", str(folder / "run.yaml"), *quick, *overrides, "--address", head, "--working-dir", str(folder)]


def test_a_run_is_submitted_and_followed_to_its_end(head, folder, capsys):
    assert main(arguments(head, folder)) == 0
    out, err = capsys.readouterr()
    assert "2 steps; everything is in" in out and f"at {head}" in err
    rows = list(read_rows(folder.parent / "runs" / "tiny-sudoku-ray" / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2]
    assert "usage/engine-1/rss_mb" in rows[0], "two engines on the cluster"


def test_a_failing_job_returns_its_exit_code(head, folder, capsys):
    missing = ("model={path: /nowhere/to/be/found, family: tiny}",)
    assert main(arguments(head, folder, *missing)) == 2
    assert "no such folder" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_detaches_and_the_job_goes_on(head, folder):
    from ray.job_submission import JobSubmissionClient

    # A shell that runs the tests in the background hands down that SIGINT is ignored.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from dllm_rl.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments(head, folder, "run.steps=100000", "run.name=long")]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    client, job = JobSubmissionClient(head), None
    try:
        metrics = folder.parent / "runs" / "long" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not metrics.exists():
            assert process.poll() is None, "".join(process.communicate())
            if time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"no step within two minutes: {process.communicate()}")
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "detached; the job goes on" in err
        job = err.split("job ", 1)[1].split(" ", 1)[0]
        before = len(metrics.read_text().splitlines())
        time.sleep(2)
        assert str(client.get_job_status(job)) == "RUNNING"
        assert len(metrics.read_text().splitlines()) > before
    finally:
        process.kill()
        if job is not None:
            client.stop_job(job)
            deadline = time.monotonic() + 60
            while str(client.get_job_status(job)) == "RUNNING" and time.monotonic() < deadline:
                time.sleep(0.2)


class Broken:
    """A dashboard whose connection breaks: before anything came, after a part, and at the log's end."""

    log = ("one\ntw", "o\nthree\n", "four\n")

    def __init__(self, *lengths):
        self.lengths = list(lengths)

    async def tail_job_logs(self, job):
        length = self.lengths.pop(0)
        for lines in self.log[:length]:
            yield lines
        if self.lengths:
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, job):
        from ray.job_submission import JobStatus

        status = JobStatus.RUNNING if self.lengths else JobStatus.FAILED
        return SimpleNamespace(status=status, driver_exit_code=3, message="ended")


def test_a_broken_connection_loses_and_repeats_nothing(monkeypatch, capsys):
    monkeypatch.setattr(submit, "RETRY_S", 0.0)
    info = submit._follow(Broken(0, 1, 0, 1, 3, 3), "job")
    assert capsys.readouterr().out == "".join(Broken.log)
    assert submit._exit_code("job", info) == 3


def test_a_dashboard_that_stays_away_is_said(monkeypatch):
    monkeypatch.setattr(submit, "RETRY_S", 0.0)
    with pytest.raises(ValueError, match=r"has not answered 31 times .*job j1 may well go on"):
        submit._follow(Broken(*[0] * 100), "j1")


def test_what_cannot_be_submitted_is_one_line_and_exit_code_2(folder, capsys):
    (port,) = free_ports(1)
    assert main(arguments(f"http://127.0.0.1:{port}", folder)) == 2
    assert f"no Ray dashboard answers at 'http://127.0.0.1:{port}'" in capsys.readouterr().err
    outside = ["submit", str(CONFIG), "--working-dir", str(folder)]
    assert main(outside) == 2
    assert "is not inside" in capsys.readouterr().err
    assert main(arguments("http://127.0.0.1:1", folder, "run.stepz=3")) == 2
    assert "stepz" in capsys.readouterr().err
