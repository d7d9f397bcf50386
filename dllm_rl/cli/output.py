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
from dllm_rl.reports.metrics import METRICS
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


_SHOWN = ("reward", "success", "loss", "eval/loss", "grad_norm", "completion_tokens", "tokens_per_forward", "step_s")
_STEPS = 5  # that the first and the last figure are means over


def metrics_table(rows: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> Table:
    """How the main figures of a run have moved.

    Args:
        rows: of metrics.jsonl.
        seconds: wall time per phase, for the line below.
    """
    longest = sorted(seconds.items(), key=lambda item: -item[1])[:4]
    spent = ", ".join(f"{name.removesuffix('_s')} {value:.0f} s" for name, value in longest if value >= 1)
    table = Table(title="run", title_justify="left", caption=spent or None, caption_justify="left")
    for column in ("", f"first {_STEPS}", f"last {_STEPS}", "unit"):
        table.add_column(column, justify="right" if column and column != "unit" else "left")
    for name in _SHOWN:
        values = [row[name] for row in rows if name in row]
        ends = (values[:1], values[-1:]) if name.startswith("eval/") else (values[:_STEPS], values[-_STEPS:])
        if values:
            table.add_row(name, *(f"{sum(end) / len(end):.4g}" for end in ends), METRICS[name].unit)
    return table


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
