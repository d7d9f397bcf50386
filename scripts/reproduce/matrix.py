"""Every algorithm on every engine and kind of model: what runs, and what is refused and why.

    python scripts/reproduce/matrix.py --write docs/matrix.md

Each cell trains a random tiny model for 2 steps of 4 x 4 Sudoku boards. A cell that cannot work must be refused before
anything starts, with the reason; any other error fails the script.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_rl import registry
from dllm_rl.config.load import load_config, validate
from dllm_rl.tasks.sudoku import Sudoku4
from dllm_rl.train import train
from rollouts.strategies.low_confidence import LowConfidence

ENGINES = ("native", "reference")
FAMILIES = {"full attention": {"family": "tiny"}, "block-causal": {"family": "sdar", "block_size": 4}}
STRATEGIES: dict[str, dict[str, Any]] = {
    "low_confidence": {"strategy": {"name": "low_confidence"}, "tokens_per_step": 2},
    "left_to_right": {"strategy": {"name": "left_to_right"}},
    "confidence_threshold": {"strategy": {"name": "confidence_threshold", "threshold": 0.2}},
    "learned": {"strategy": {"name": "learned", "width": 16}},
    "one that revises": {"strategy": {"name": "matrix:Undecided"}, "tokens_per_step": 2},
}
METHODS = Path(__file__).resolve().parents[2] / "configs" / "methods"


class Shapes(Sudoku4):
    """Sudoku where ending in 1 or 2 counts as solved, so that a random model solves some."""

    success = "format"


class Undecided(LowConfidence):
    """Says that it changes its mind."""

    revises = True


@dataclass(frozen=True)
class Cell:
    """What came of a combination."""

    updates: int  # steps with an update
    seconds: float
    refused: str | None  # the reason


def run(algorithm: str, strategy: str, engine: str, family: str) -> Cell:
    """Train one combination."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        tiny = load_config(METHODS / f"{algorithm}_tiny.yaml")
        untaught = {"retain": 0.25} if tiny.model.teacher is not None else {}  # itself, with later tokens in sight
        greedy = {"temperature": 0.0} if strategy == "learned" and tiny.sampling.temperature == 0 else {}
        config = {
            "run": {"name": "run", "steps": 2, "output": folder, "threads": 1},
            "model": FAMILIES[family]
            | {"init": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_length": 40}},
            "data": {
                "task": {"name": "matrix:Shapes", "train_puzzles": 16, "test_puzzles": 4},
                "prompts_per_step": 4,
                "samples_per_prompt": 4,
            },
            "sampling": {"max_new_tokens": 16} | STRATEGIES[strategy] | greedy,
            "engine": {"name": engine},
            "algorithm": tiny.algorithm.model_dump() | untaught,
            "rewards": [{"name": "sudoku", "mode": "cells"}, {"name": "format", "pattern": "[12]$"}],
            "reward_pool": {"self_test": 0, "workers": 1},
            "learner": {"lr": 1e-3},
            "evaluate": {"limit": 4, "at_start": False},
            "diagnostics": {"every_steps": 1, "rows": 2, "redraws": 2},
        }
        try:
            summary = train(validate(config))
        except ValueError as error:
            if (Path(folder) / "run" / "metrics.jsonl").exists():
                raise  # too late to refuse
            return Cell(0, time.perf_counter() - started, str(error))
        rows = (summary.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return Cell(sum('"loss"' in row for row in rows), time.perf_counter() - started, None)


def table(cells: dict[tuple[str, str, str, str], Cell]) -> str:
    """The Markdown page."""
    columns = [(family, engine) for family in FAMILIES for engine in ENGINES]
    head = "| algorithm | strategy | " + " | ".join(f"{family}, {engine}" for family, engine in columns) + " |"
    lines, reasons = [head, "|" + "---|" * (2 + len(columns))], []
    for algorithm, strategy in dict.fromkeys((a, s) for a, s, _, _ in cells):
        shown = []
        for family, engine in columns:
            cell = cells[algorithm, strategy, engine, family]
            if cell.refused is None:
                shown.append("runs" if cell.updates == 2 else f"runs ({cell.updates} updates)")
                continue
            if cell.refused not in reasons:
                reasons.append(cell.refused)
            shown.append(f"refused [{reasons.index(cell.refused) + 1}]")
        lines.append(f"| {algorithm} | {strategy} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""])


def main() -> None:
    """Run every cell and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    started = time.perf_counter()
    cells: dict[tuple[str, str, str, str], Cell] = {}
    for algorithm in registry.names("algorithms"):
        for strategy in STRATEGIES:
            for engine in ENGINES:
                for family in FAMILIES:
                    cells[algorithm, strategy, engine, family] = run(algorithm, strategy, engine, family)
        print(f"{algorithm}: {time.perf_counter() - started:.0f} s", flush=True)
    page = table(cells)
    ran = sum(cell.refused is None for cell in cells.values())
    text = (
        "# Which combinations run\n\nEvery algorithm, engine and kind of model, with a few unmasking strategies: 2 "
        "steps each of a random tiny model.\nWritten by `python scripts/reproduce/matrix.py --write docs/matrix.md`: "
        f"{ran} cells ran, {len(cells) - ran} were refused before anything started,\n"
        f"in {time.perf_counter() - started:.0f} s.\n\n{page}"
    )
    print(text)
    print(f"{time.perf_counter() - started:.0f} s")
    if arguments.write is not None:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
