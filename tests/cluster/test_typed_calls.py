"""A type checker sees what is wrong with a remote call before it is made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SNIPPET = """
from dllm_rl.cluster.group import WorkerGroup
from dllm_rl.workers.engine_worker import EngineWorker
from dllm_rl.workers.learner_worker import LearnerWorker


def calls(engines: WorkerGroup[EngineWorker]) -> None:
    engines.call(EngineWorker.sleep)
    number: int = engines.submit(0, EngineWorker.shares_weights).result()
    engines.submit(0, EngineWorker.slep)
    engines.submit(0, EngineWorker.activate, 3)
    engines.submit(0, EngineWorker.activate)
    engines.submit(0, EngineWorker.commit_push, stepp=1)
    engines.submit(0, LearnerWorker.version)
    wrong: str = engines.submit(0, EngineWorker.shares_weights).result()
"""


def test_mypy_sees_misspelt_methods_and_wrong_arguments(tmp_path):
    """Lines 8 and 9 are right (a bool is an int); each line after them has one mistake."""
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", tmp_path / "snippet.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = dict.fromkeys(int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line)
    assert list(found) == [10, 11, 12, 13, 14, 15], done.stdout + done.stderr
    assert '"type[EngineWorker]" has no attribute "slep"' in done.stdout
    assert 'incompatible type "int"; expected "WeightsVersion"' in done.stdout
