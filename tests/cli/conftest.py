"""A small run that the command-line tests share, and the pieces of its configuration."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from dllm_rl.cli.main import main

SUDOKU: dict[str, Any] = {
    "run": {"name": "run", "steps": 2, "threads": 1},
    "model": {"family": "tiny", "init": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_length": 40}},
    "data": {
        "task": {"name": "sudoku4", "train_puzzles": 20, "test_puzzles": 10, "min_holes": 4, "max_holes": 6},
        "prompts_per_step": 2,
        "samples_per_prompt": 2,
    },
    "sampling": {"max_new_tokens": 16, "tokens_per_step": 4},
    "algorithm": {"name": "trace_rl"},
    "rewards": [{"name": "sudoku"}, {"name": "format", "pattern": "[12]$"}],
    "learner": {"lr": 1.0e-3},
    "evaluate": {"limit": 6, "at_start": False},
    "checkpoint": {"every_steps": 1},
}


@pytest.fixture
def write(tmp_path):
    """Writes a configuration with some values replaced ("section.key": value) and returns its path."""

    def make(changes: dict[str, Any] | None = None, name: str = "config.yaml", output: Path | None = None) -> Path:
        values = copy.deepcopy(SUDOKU)
        values["run"]["output"] = str(output or tmp_path / "runs")
        for key, value in (changes or {}).items():
            section = values
            *parents, last = key.split(".")
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values))
        return path

    return make


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a run of two steps with two checkpoints. Read only: copy it before changing anything."""
    folder = tmp_path_factory.mktemp("finished")
    values = copy.deepcopy(SUDOKU)
    values["run"]["output"] = str(folder)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    assert main(["train", str(config), "--quiet"]) == 0
    return folder / "run"


@pytest.fixture
def refuse(capsys, tmp_path):
    """Runs a command and holds its message to the rules: exit code 2, one line with the words, no run folder.

    Except for a run that had begun when it failed.
    """

    def check(arguments: list[str], words: list[str], *, begun: bool = False) -> None:
        capsys.readouterr()
        run = tmp_path / "runs" / "run"
        there = run.exists()
        code = main([*arguments])
        lines = capsys.readouterr().err.splitlines()
        assert (code, len(lines)) == (2, 1), lines
        assert lines[0].startswith("error: "), lines[0]
        for word in words:
            assert word in lines[0], (word, lines[0])
        assert begun or run.exists() == there, "a refused run must leave room for the next"

    return check
