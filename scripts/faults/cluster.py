"""What happens to a run when its cluster fails: processes of Ray, addresses that are silent, workers, nodes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from fault_row import Row

from dllm_rl.cluster.connection import ray_connection
from dllm_rl.errors import UserError

TITLE = "The cluster"
ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "tiny_sudoku_ray.yaml"
SILENT_S = 15.0  # within which a run says that nothing answers
CHAOS = (
    ("engine", "an engine is killed while it decodes"),
    ("learner", "a learner is killed in an update"),
    ("node", "a node goes"),
)


def faults(output: Path) -> Iterator[Row]:
    """Try each, one row per kind."""
    for name in ("raylet", "gcs_server"):
        seconds, code, said = ended(output / name, name)
        well = code == 1 and len(said) == 1 and f"its {name} (process" in said[0]
        seen = f"exit code {code} after {seconds:.0f} s, {len(said)} line"
        yield Row(f"the {name} of a private Ray is killed", 1, int(well), seen)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with socket.create_server(("127.0.0.1", 0)) as closing:
            closed = closing.getsockname()[1]
        places = (f"127.0.0.1:{silent.getsockname()[1]}", f"127.0.0.1:{closed}", "192.0.2.1:6379")
        tried = [refused(place) for place in places]
    well = sum(code == 2 and seconds < SILENT_S for seconds, code in tried)
    seen = f"exit code 2 after {max(seconds for seconds, _ in tried):.0f} s at most"
    yield Row("`cluster.address` is silent, closed or unreachable", len(tried), well, seen)
    for fault, words in CHAOS:
        command = [sys.executable, str(ROOT / "scripts" / "chaos.py"), fault]
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
        well = done.returncode == 0 and done.stdout.count("the same bits") == 1
        lost = done.stdout.count(" is lost:")
        yield Row(words, 1, int(well), f"{lost} workers built anew, the weights of an undisturbed run")


def environment() -> dict[str, str]:
    """Of a run that chooses nothing about Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def train(*overrides: str) -> list[str]:
    """The command of a run."""
    return [sys.executable, "-m", "dllm_rl", "train", str(CONFIG), "--quiet", *overrides]


def ended(output: Path, name: str) -> tuple[float, int, list[str]]:
    """(seconds, exit code, lines on stderr) of a run in which one of Ray's processes is killed after a checkpoint."""
    command = train(f"run.output={output}", "run.steps=100000", "checkpoint.every_steps=1", "evaluate.at_start=false")
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not list(output.glob("*/checkpoints/step-*")):
            if process.poll() is not None:
                return 0.0, process.returncode, process.communicate()[1].splitlines()
            time.sleep(0.1)
        victim = next(one for one in psutil.Process(process.pid).children(recursive=True) if one.name() == name)
        begin = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        said = process.communicate(timeout=120)[1]
        return time.monotonic() - begin, process.returncode, said.strip().splitlines()
    finally:
        process.kill()


def refused(address: str) -> tuple[float, int]:
    """(seconds, exit code) of joining a cluster where none is, without the start of the program."""
    begin = time.monotonic()
    try:
        with ray_connection(address, "faults", 1.0):
            return time.monotonic() - begin, 0
    except UserError:
        return time.monotonic() - begin, 2
