"""Rows of local files or of the hub; every error names the file and the line."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dllm_rl.errors import UserError, first_line, nearest

Row = tuple[str, dict[str, Any]]  # where it stands, for messages ("train.jsonl, line 3"), and its columns


def read_rows(path: str | Path, limit: int | None = None, split: str = "train") -> list[Row]:
    """The rows of local files.

    JSON and CSV are read here rather than by ``datasets``, which knows no line numbers and turns a CSV's "007" into 7.

    Args:
        path: JSON lines (``.jsonl``), one JSON array (``.json``) or ``.csv``, each also gzipped, ``.parquet``, a
            glob of such files, read in the order of their names, or a folder of ``datasets.save_to_disk``.
        limit: only the first so many rows.
        split: which part of a folder that holds several.
    Raises:
        UserError: no such file, an empty one, or a row that is not one.
    """
    name = os.path.expandvars(os.path.expanduser(path))
    if os.path.isdir(name):
        rows = _saved(Path(name), split)
    else:
        files = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) and not os.path.exists(name) else [name]
        if not files:
            raise UserError(f"no data file matches '{path}' (looked from '{Path.cwd()}')")
        rows = [row for file in files for row in _file(Path(file), limit)]
    if not rows:
        raise UserError(f"'{path}' holds no rows; a data set needs at least one")
    return rows[:limit]


def _file(path: Path, limit: int | None) -> list[Row]:
    reader = _READERS.get(Path(path.name.removesuffix(".gz")).suffix)
    if reader is None or path.name.endswith(".parquet.gz"):
        raise UserError(
            f"'{path}': cannot read this kind of file; give .jsonl, .json or .csv (also with .gz), .parquet, a glob of "
            f"such files, or a folder of datasets.save_to_disk"
        )
    if not path.is_file():
        raise UserError(f"no data file '{path}' (looked from '{Path.cwd()}')")
    return list(reader(path, limit))


def _saved(folder: Path, split: str) -> list[Row]:
    import datasets  # takes seconds, and files do not need it

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{folder}' is not a folder of datasets.save_to_disk ({first_line(error)}); for the files in it "
            f"give a glob such as '{folder}/*.jsonl'"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(f"'{folder}' has no split '{split}'{nearest(split, found)}")
        found = found[split]
    return [(f"{folder}, row {i}", dict(row)) for i, row in enumerate(found, 1)]


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


def _csv(path: Path, limit: int | None) -> Iterator[Row]:
    """Rows of a CSV with a header; every value is text, as it stands there."""
    csv.field_size_limit(sys.maxsize)  # 128 KiB by default, less than a long completion
    reader = csv.DictReader(io.StringIO(_decoded(_bytes(path), str(path)), newline=""), strict=True)
    try:
        twice = [name for name, times in Counter(reader.fieldnames or ()).items() if times > 1]
        if twice:
            raise UserError(f"{path}, line 1: column '{twice[0]}' is named twice")
        for row in islice(reader, limit):
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: has not as many fields as the header has columns")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.reader.line_num}: not valid CSV: {error}") from None


def _parquet(path: Path, limit: int | None) -> Iterator[Row]:
    import pyarrow as arrow
    import pyarrow.parquet

    try:
        rows = arrow.parquet.read_table(path).slice(0, limit).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"'{path}' is not a readable parquet file: {first_line(error)}") from None
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


_READERS: dict[str, Callable[[Path, int | None], Iterator[Row]]] = {
    ".jsonl": _lines,
    ".json": _array,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None


def _parse(text: bytes, where: str) -> Any:
    try:
        value = json.loads(_decoded(text, where), object_pairs_hook=_unique, parse_constant=_no_constant)
        if b"\\u" in text:  # only an escape can make half a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UserError:
        raise
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise UserError(f"{where}: not valid JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply for a row of data") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(f"{where}: holds {half}, half of a surrogate pair and no character; take it out") from None
    except ValueError as error:  # of the two hooks, or a number of thousands of digits
        raise UserError(f"{where}: not valid JSON: {first_line(error)}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} is given twice")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number; write null, or text, or leave the column out")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: is {type(value).__name__}, expected an object with named columns")
    return value
