"""Runs in less and less address space: each finishes, or says in one line in which phase memory ran out."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml
from fault_row import Row

TITLE = "Memory that runs out"
MB = 1 << 20
# Room beside what is mapped once everything is imported.
ROOM_MB = (9000, 6000, 4000, 2000, 1000, 500, 200, 100, 50, 25)
CONFIG = {
    "run": {"name": "run", "steps": 1, "threads": 1},
    "model": {"family": "tiny", "init": {"hidden_size": 256, "num_layers": 8, "num_heads": 4, "max_length": 64}},
    "data": {
        "task": {"name": "sudoku4", "train_puzzles": 64, "test_puzzles": 8},
        "prompts_per_step": 64,
        "samples_per_prompt": 8,
    },
    "sampling": {"max_new_tokens": 16, "tokens_per_step": 16},
    "algorithm": {"name": "diffu_grpo", "beta": 0.0},
    "rewards": [{"name": "format", "pattern": "[12]$"}, {"name": "sudoku", "weight": 0.0}],
    "reward_pool": {"self_test": 0, "workers": 1},
    "evaluate": {"at_start": False, "at_end": False},
    "diagnostics": {"every_steps": None},
}
IMPORTED = """
import algorithms.diffu_grpo, psutil, rollouts.native, dllm_rl.train
print(psutil.Process().memory_info().vms)
"""


def faults(output: Path) -> Iterator[Row]:
    """Train with each limit.

    Args:
        output: folder for the runs.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    asked = subprocess.run(
        [sys.executable, "-c", IMPORTED], env=environment, capture_output=True, text=True, check=True
    )
    mapped, seen = int(asked.stdout), Counter[str]()
    for room in ROOM_MB:
        limit = mapped + room * MB
        config = output / f"{room}.yaml"
        config.write_text(yaml.safe_dump({**CONFIG, "run": {**CONFIG["run"], "output": str(output / str(room))}}))
        done = subprocess.run(
            [sys.executable, "-m", "dllm_rl", "train", str(config), "--quiet"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
        lines = done.stderr.splitlines()
        phase = re.search(r"out of memory in phase '([a-z ]+)'|ran out of memory", done.stderr)
        if done.returncode == 0:
            seen["finished"] += 1
        elif done.returncode == 1 and len(lines) == 1 and phase is not None:
            seen[phase[1] or "driver"] += 1
        else:
            seen["lost"] += 1
            print(f"{room} MB: exit code {done.returncode}: {lines[-1:]}", file=sys.stderr)
    told = ", ".join(f"{name} {count}" for name, count in seen.items())
    text = f"address space for {max(ROOM_MB):,} to {min(ROOM_MB)} MB beside the imports"
    yield Row(text, len(ROOM_MB), len(ROOM_MB) - seen["lost"], f"one line with the phase and what to lower ({told})")
