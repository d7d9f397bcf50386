"""Tables and JSON of results."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dllm_rl.evaluation.evaluate import Evaluation


def stdout() -> Console:
    """Standard output: as wide as the terminal, or wide enough for a table when it goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 160)


def write_json(path: Path | None, values: Mapping[str, Any]) -> None:
    """Write a result in one rename."""
    if path is None:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


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
