"""A scheduler's SIGTERM: the step is finished, a checkpoint is written, and the run goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dllm_rl.cli.main import main
from dllm_rl.reports.run_folder import read_rows

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny_sudoku_ray.yaml"


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_sigterm_saves_and_exits_with_0(tmp_path, kind):
    changes = [f"run.output={tmp_path}", "run.name=run", "checkpoint.every_steps=null", "evaluate.at_end=false"]
    changes += [f"cluster.kind={kind}", "cluster.engines=1", "cluster.address=local"]
    command = [sys.executable, "-m", "dllm_rl", "train", str(CONFIG), *changes]
    process = subprocess.Popen(
        [*command, "run.steps=100000"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    steps = len(list(read_rows(metrics)))
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}").is_dir(), "the step that was under way is saved"
    more = [f"run.steps={steps + 1}", "cluster.kind=local"]
    assert main(["train", str(CONFIG), *changes, *more, "--resume", "--quiet"]) == 0
    assert [row["step"] for row in read_rows(metrics)] == list(range(1, steps + 2))
