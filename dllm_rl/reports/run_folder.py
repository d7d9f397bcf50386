"""What a run leaves behind: config.yaml, metrics.jsonl, samples.jsonl, ledger.jsonl, checkpoints/, plot.png."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_rl.errors import UserError
from dllm_rl.reports.metrics import METRICS, describe
from dllm_rl.types import Metric


class RunFolder:
    """Writes a run's records. Every line is flushed, so a killed run loses at most the line being written.

    Attributes:
        declared: metrics that may be logged beside METRICS.
    """

    def __init__(
        self, path: Path, also: Callable[[int, Mapping[str, float]], None] = lambda step, values: None
    ) -> None:
        """Make the folder.

        Args:
            path: of the run.
            also: told every row of metrics.
        """
        self.path, self._also = path, also
        self.declared: Mapping[str, Metric] = METRICS
        self.checkpoints = path / "checkpoints"
        path.mkdir(parents=True, exist_ok=True)

    def write_config(self, text: str) -> None:
        """The resolved configuration, as YAML."""
        (self.path / "config.yaml").write_text(text, encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row of metrics; every name must be declared."""
        for name in values:
            describe(name, self.declared)
        self._append("metrics.jsonl", [{"step": step, **values}])
        self._also(step, values)

    def log_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append decoded completions."""
        self._append("samples.jsonl", [{"step": step, **row} for row in rows])

    def log_prompts(self, step: int, uids: Sequence[str], weights_step: int) -> None:
        """Append what a step has learned from: the ledger shows that no prompt was lost or came twice."""
        self._append("ledger.jsonl", [{"step": step, "weights_step": weights_step, "uids": list(uids)}])

    def rewind(self, step: int) -> None:
        """Forget records after this step: a resumed run writes them again."""
        for name in ("metrics.jsonl", "samples.jsonl", "ledger.jsonl"):
            path = self.path / name
            if path.exists():
                kept = [row for row in read_rows(path) if row["step"] <= step]
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
                os.replace(temporary, path)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows logged so far."""
        path = self.path / "metrics.jsonl"
        return list(read_rows(path)) if path.exists() else []

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(path: Path) -> Iterable[dict[str, Any]]:
    """Rows of a JSON-lines record; a last line cut off by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise UserError(f"{path}, line {number + 1}: not JSON") from None


def comparable(folder: Path) -> list[dict[str, Any]]:
    """Metrics of a run without what the machine decides (times, usage): equal for two runs with the same bits."""
    return [
        {name: value for name, value in row.items() if not name.endswith("_s") and not name.startswith("usage/")}
        for row in read_rows(folder / "metrics.jsonl")
    ]
