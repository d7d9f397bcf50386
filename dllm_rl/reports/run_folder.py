"""What a run leaves behind: config.yaml, metrics.jsonl, samples.jsonl, ledger.jsonl, checkpoints/, plot.png.

A checkpoint knows how long each record was when it was written. Going on from it cuts the records there, so that they
and the weights are always of one history, whatever a crash has left at their ends.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_rl.errors import UserError
from dllm_rl.reports.metrics import METRICS, describe
from dllm_rl.storage import checkpoint, files
from dllm_rl.types import Metric

RECORDS = ("metrics.jsonl", "samples.jsonl", "ledger.jsonl")


class RunFolder:
    """Writes a run's records. Every line is flushed, so a killed run loses at most the line being written.

    Attributes:
        declared: metrics that may be logged beside METRICS.
        about: what every checkpoint is to know of the run beside its counters.
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
        self.about: Mapping[str, Any] = {}
        self.checkpoints = path / "checkpoints"
        path.mkdir(parents=True, exist_ok=True)

    def write_config(self, text: str) -> None:
        """The resolved configuration, as YAML."""
        with files.explained(f"'{self.path / 'config.yaml'}' cannot be written", self.path):
            files.replace(self.path / "config.yaml", text)

    def save(self, step: int, counters: Mapping[str, Any], fill: Callable[[Path], None], *, keep: int) -> Path:
        """Write a checkpoint that knows how long the records are; see checkpoint.write."""
        lengths = {}
        with files.explained(f"the records in '{self.path}' cannot be written", self.path):
            for record in self._records():
                files.sync(record)
                lengths[record.name] = record.stat().st_size
        state = {**counters, **self.about, "records": lengths}
        return checkpoint.write(self.checkpoints, step, state, fill, keep=keep)

    def set_aside(self, later_than: int) -> Path | None:
        """Move checkpoints of later steps, with a copy of the records, into a run folder of their own.

        A crash meanwhile leaves the newest remaining checkpoint and its records as they were.

        Args:
            later_than: step from which the run goes on; -1 = from its start, and the records alone are worth keeping.
        Returns:
            that folder, or None: there is nothing to set aside.
        """
        later = [name for name in checkpoint.names(self.checkpoints) if int(name.split("-")[1]) > later_than]
        if not later and (later_than >= 0 or not self._records()):
            return None
        number = 1 + max([0, *(int(p.name.split("-")[1]) for p in self.path.glob("aside-*"))])
        aside, hidden = self.path / f"aside-{number}", self.path / ".aside"
        with files.explained(f"'{aside}' cannot be written", self.path, "the run is as it was"):
            shutil.rmtree(hidden, ignore_errors=True)  # of a start that was killed
            (hidden / "checkpoints").mkdir(parents=True)
            for file in [*self._records(), *self.path.glob("config.yaml")]:
                shutil.copyfile(file, hidden / file.name)
                files.sync(hidden / file.name)
            hidden.rename(aside)
            for name in reversed(later):  # the newest first: what is left is always a history without holes
                (self.checkpoints / name).rename(aside / "checkpoints" / name)
            files.sync(self.path)
        return aside

    def _records(self) -> list[Path]:
        return [self.path / name for name in RECORDS if (self.path / name).exists()]

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

    def rewind(self, found: Path | None, step: int = -1) -> list[str]:
        """Forget records after a checkpoint: what goes on from there writes them again.

        Args:
            found: the checkpoint, or None: no checkpoint has been written yet.
            step: without a checkpoint, rows of later steps are forgotten; -1 = all.
        Returns:
            records that the checkpoint has seen and that are no longer there.
        Raises:
            UserError: a record is shorter than it was then, or damaged.
        """
        state = {} if found is None else checkpoint.state(found)
        lengths = state.get("records")
        missing = [] if lengths is None else [name for name in lengths if not (self.path / name).exists()]
        for record in self._records():
            if lengths is not None:
                _cut(record, lengths.get(record.name, 0), str(found))
            elif found is None and step < 0:
                _cut(record, 0, "")
            else:  # learners that were lost before the first checkpoint; and checkpoints of earlier versions
                kept = [row for row in read_rows(record) if row["step"] <= state.get("step", step)]
                files.replace(record, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        return missing

    def metrics(self) -> list[dict[str, Any]]:
        """The rows logged so far."""
        path = self.path / "metrics.jsonl"
        return list(read_rows(path)) if path.exists() else []

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        hint = "make room, then go on with --resume"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path, what = self.path / name, f"'{self.path / name}' cannot be written"
        with files.explained(what, self.path, hint), path.open("ab") as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))  # a decoder may give half a surrogate pair


def _cut(record: Path, length: int, checkpoint_name: str) -> None:
    """Shorten a record to what it was, after a look at what remains."""
    hint = "restore it from a copy, or move it away to go on without its rows"
    with record.open("rb+") as file:
        if (size := os.fstat(file.fileno()).st_size) < length:
            raise UserError(f"'{record}' has {size} bytes, and had {length} at '{checkpoint_name}'; {hint}")
        rows = file.read(length)
        if b"\0" in rows or not rows.endswith(b"\n" if length else b""):
            raise UserError(f"'{record}' is damaged before '{checkpoint_name}'; {hint}")
        file.truncate(length)
        os.fsync(file.fileno())


def read_rows(path: Path) -> Iterable[dict[str, Any]]:
    """Rows of a JSON-lines record; an end that was cut off by a crash is left out."""
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip(b"\0 "):
        lines.pop()
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            yield json.loads(line)
        except ValueError:  # not JSON, or a cut UTF-8 character
            if number < len(lines) - 1:
                raise UserError(f"{path}, line {number + 1}: not JSON") from None


def comparable(folder: Path) -> list[dict[str, Any]]:
    """Metrics of a run without what the machine decides (times, usage): equal for two runs with the same bits."""
    return [
        {name: value for name, value in row.items() if not name.endswith("_s") and not name.startswith("usage/")}
        for row in read_rows(folder / "metrics.jsonl")
    ]
