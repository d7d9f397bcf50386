"""Tables and JSON of results."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dllm_rl.evaluation.evaluate import Evaluation
from dllm_rl.storage import files


def stdout() -> Console:
    """Standard output: as wide as the terminal, or wide enough for a table when it goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 160)


def write_json(path: Path | None, values: Mapping[str, Any]) -> None:
    """Write a result in one rename."""
    if path is None:
        return
    with files.explained(f"--json {path} cannot be written", path.parent):
        files.replace(path, json.dumps(values, indent=1) + "\n")


def evaluation_table(title: str, rows: Sequence[tuple[str, Evaluation]]) -> Table:
    """One line per evaluation: success with its interval, components, speed."""
    table = Table(title=title, title_justify="left")
    for name in ("", "tokens per forward", "success", "95% interval", "components", "scored", "failed", "seconds"):
        table.add_column(name, justify="right" if name else "left")
    for label, e in rows:
        table.add_row(
            label,
            f"{e.tokens_per_forward:.2f}",
            f"{e.success:.1%}",
            f"{e.low:.1%} .. {e.high:.1%}",
            ", ".join(f"{name} {value:.3f}" for name, value in e.components.items()),
            str(e.scored),
            str(e.failed),
            f"{e.seconds:.1f}",
        )
    return table
