"""Rows of local files or of the hub; every error names the file and the line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dllm_rl.errors import UserError, first_line

Row = tuple[str, dict[str, Any]]  # where it stands, for messages ("train.jsonl, line 3"), and its columns


def read_rows(path: str | Path, limit: int | None = None) -> list[Row]:
    """The rows of a local file, read here rather than by ``datasets``, which knows no line numbers.

    Args:
        path: JSON lines (``.jsonl``) or one JSON array (``.json``), either also gzipped (``.gz``).
        limit: only the first so many rows.
    Raises:
        UserError: no such file, an empty one, or a line that is not a JSON object.
    """
    path = Path(path).expanduser()
    name = path.name.removesuffix(".gz")
    if not name.endswith((".jsonl", ".json")):
        raise UserError(f"'{path}': cannot read this kind of file; give .jsonl, .json, .jsonl.gz or .json.gz")
    if not path.is_file():
        raise UserError(f"no data file '{path}' (looked from '{Path.cwd()}')")
    rows = list(_lines(path, limit) if name.endswith(".jsonl") else _array(path, limit))
    if not rows:
        raise UserError(f"'{path}' holds no rows; a data set needs at least one")
    return rows


def hub_rows(hub: str, configuration: str | None, split: str) -> list[Row]:
    """The rows of a data set of the hub (or of its local cache).

    Args:
        hub: its name, "owner/name".
        configuration: one of its configurations; None = all of them, one after the other.
        split: "train" or "test".
    Raises:
        UserError: it cannot be loaded.
    """
    import datasets  # takes seconds, and local files do not need it

    try:
        parts = [configuration] if configuration else datasets.get_dataset_config_names(hub)
        tables = [(part, datasets.load_dataset(hub, part, split=split)) for part in parts]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data set '{hub}' cannot be loaded from the hub ({first_line(error)}); give local files instead: "
            f"data.task.train_file and data.task.test_file"
        ) from error
    return [(f"{hub}/{part}/{split}, row {i}", dict(row)) for part, rows in tables for i, row in enumerate(rows, 1)]


def field(row: dict[str, Any], name: str, where: str) -> str:
    """A column that must be text with something in it.

    Raises:
        UserError: naming file, line and column.
    """
    if name not in row:
        raise UserError(f"{where}: no column '{name}'; the row has {', '.join(row) or 'none'}")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: column '{name}' is {value!r:.60}, expected text")
    return value


def _bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"'{path}' is not a complete gzip file: {error}") from None


def _lines(path: Path, limit: int | None) -> Iterator[Row]:
    lines = _bytes(path).split(b"\n")  # not splitlines: JSON text may hold other line ends
    if not lines[-1].strip():
        lines.pop()  # the newline that ends the file
    for number, line in enumerate(lines[:limit], start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            raise UserError(f"{where}: is blank; remove it")
        yield where, _object(_parse(line, where), where)


def _array(path: Path, limit: int | None) -> Iterator[Row]:
    rows = _parse(_bytes(path), str(path))
    if not isinstance(rows, list):
        raise UserError(f"'{path}' holds {type(rows).__name__}, expected a JSON array of rows; for JSON lines: .jsonl")
    for number, row in enumerate(rows[:limit], start=1):
        yield f"{path}, row {number}", _object(row, f"{path}, row {number}")


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise UserError(f"{where}: not valid JSON: {error.msg} at {place}") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: is {type(value).__name__}, expected an object with named columns")
    return value
