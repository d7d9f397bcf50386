"""A run of three steps that ends in seconds, and what is left of it after a fault."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file

from dllm_rl.config.load import validate
from dllm_rl.errors import RunStopped, UserError
from dllm_rl.reports.progress import Quiet
from dllm_rl.reports.run_folder import comparable, read_rows
from dllm_rl.train import train
from tests.faulty_disk import FaultyDisk, Killed

STEPS = 3


class Said(Quiet):
    """Keeps what the run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


def configuration(output: Path, **sections) -> dict:
    """Supervised, so that nothing but the learner and the disk is at work."""
    values = {
        "run": {"name": "run", "steps": STEPS, "output": str(output), "threads": 1, "log_samples": 1},
        "model": {"family": "tiny", "init": {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "max_length": 64}},
        "data": {
            "task": {"name": "sudoku4", "train_puzzles": 8, "test_puzzles": 2, "min_holes": 4, "max_holes": 6},
            "prompts_per_step": 2,
        },
        "sampling": {"max_new_tokens": 16},
        "algorithm": {"name": "masked_sft"},
        "rewards": [],
        "learner": {"lr": 1e-2},
        "evaluate": {"at_start": False, "at_end": False},
        "checkpoint": {"every_steps": 1, "keep": 2},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return values


def run(output: Path, resume: bool = False, **options):
    """Train, or go on."""
    sections = options.pop("sections", {})
    return train(validate(configuration(output, **sections)), resume=resume, **options)


def outcome(folder: Path) -> tuple:
    """Everything that must be the same bits: final weights, metrics, ledger."""
    weights = load_file(folder / "checkpoints" / f"step-{STEPS:06d}" / "model" / "model.safetensors")
    ledger = [row["uids"] for row in read_rows(folder / "ledger.jsonl")]
    return {name: value.tolist() for name, value in weights.items()}, comparable(folder), ledger


def operations(output: Path) -> FaultyDisk:
    """An undisturbed run, its operations counted."""
    with FaultyDisk(output).attached() as disk:
        run(output)
    return disk


def survived(output: Path, fail_at: int, kind: str, expected: tuple) -> str:
    """Fail one operation, then go on as a user would; says how it ended.

    Returns:
        "same bits", or "refused: ..." with the one line; anything else is raised.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    try:
        with FaultyDisk(output, fail_at, kind).attached():
            run(output)
    except Killed:
        pass
    except (UserError, RunStopped, OSError) as error:
        if (isinstance(error, OSError) and error.errno is None) or "\n" in str(error):
            raise
    started = (output / "run" / "metrics.jsonl").exists() or (output / "run" / "checkpoints").exists()
    try:
        run(output, resume=started)
    except (UserError, RunStopped) as error:
        assert "\n" not in str(error)
        return f"refused: {error}"
    assert outcome(output / "run") == expected, (fail_at, kind)
    return "same bits"
