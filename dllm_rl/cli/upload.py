"""What submit uploads: code, configurations and the data that the run names; nothing that looks like a secret."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from dllm_rl.cli.secrets import secret_line, secret_name
from dllm_rl.errors import UserError

CODE = ("*.py", "*.pyi", "*.yaml", "*.yml", "*.toml", "setup.cfg", "requirements*.txt", "constraints*.txt", "*.jinja")
PASSED_OVER = {"runs", "venv", "node_modules", "__pycache__", "site-packages", "build", "dist", "wandb", "mlruns"}
WEIGHTS = ("*.pt", "*.pth", "*.bin", "*.ckpt", "*.safetensors")  # beside code; a model that the run names is uploaded
SCANNED_BYTES = 1 << 20  # of each file, for keys; larger files are data
_PATH_KEY = re.compile(r"(path|files?|folder|dir)$")  # of the options that may name a folder


@dataclass(frozen=True)
class Upload:
    """Files of a working directory.

    Attributes:
        root: the working directory.
        files: to be uploaded, relative to it, with their sizes in bytes.
        refused: what would be uploaded if it were not named like a secret.
        outside: links that lead out of the directory, to a folder or nowhere; they are not followed.
    """

    root: Path
    files: dict[PurePath, int] = field(default_factory=dict)
    refused: list[PurePath] = field(default_factory=list)
    outside: list[PurePath] = field(default_factory=list)

    @property
    def megabytes(self) -> float:
        """Of all files."""
        return sum(self.files.values()) / 1e6

    def copy_to(self, folder: Path) -> None:
        """Copy the files; links become what they point to."""
        for path in self.files:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / path, folder / path)

    def lines(self, *, everything: bool) -> Iterator[str]:
        """Describe it, with the largest files or with all of them."""
        yield f"uploading {len(self.files)} files, {self.megabytes:.1f} MB, of {self.root}"
        largest = sorted(self.files, key=lambda path: (-self.files[path], path))
        for path in sorted(self.files) if everything else largest[:3]:
            yield f"  {self.files[path] / 1e6:8.3f} MB  {path}"
        for paths, why in ((self.refused, "named like secrets"), (self.outside, "links that are not followed")):
            if paths:
                shown = paths if everything else paths[:5]
                more = f" and {len(paths) - len(shown)} more" if len(paths) > len(shown) else ""
                yield f"left out, {why}: {', '.join(map(str, shown))}{more}"


def choose(
    root: Path,
    values: Mapping[str, Any],
    *,
    include: Sequence[str] = (),
    excluded: Callable[[str], bool] = lambda path: False,
    limit_mb: float,
) -> Upload:
    """Choose what is uploaded.

    Args:
        root: the working directory, resolved.
        values: the configuration; files and folders that it names by a relative path are uploaded.
        include: patterns of further files, "prompts/*.txt".
        excluded: whether the user wants a file left out.
        limit_mb: what all files may have together.
    Raises:
        UserError: a file holds a key, a named file is refused, or it is too much.
    """
    found = Upload(root)
    named = dict(_named(root, values))
    output = _inside(root, Path(str(values.get("run", {}).get("output", ""))))
    for path in _walk(root, [root / name for name in named], output, found):
        relative = PurePath(path.relative_to(root))
        by_config = next((key for name, key in named.items() if relative.is_relative_to(name)), "")
        wanted = by_config or _is_code(root, relative) or any(fnmatchcase(str(relative), one) for one in include)
        if not wanted or excluded(str(relative)):
            continue
        target = _inside(root, path)
        if target is None or not path.is_file():
            found.outside.append(relative)
        elif secret_name(relative) or secret_name(target):
            found.refused.append(relative)
        else:
            found.files[relative] = path.stat().st_size
            continue
        if by_config and str(relative) in named:
            why = "leads out of the working directory" if target is None else "is named like a secret"
            raise UserError(
                f"{by_config} = {relative}: {why} and is not uploaded; put it under another name, or give an absolute "
                f"path that the cluster has"
            )
    if found.megabytes > limit_mb:
        largest = max(found.files, key=lambda path: found.files[path])
        raise UserError(
            f"{len(found.files)} files of '{root}' are {found.megabytes:.0f} MB, more than --max-upload-mb "
            f"{limit_mb:g}; the largest is {largest} ({found.files[largest] / 1e6:.0f} MB): put models and data on a "
            f"file system that the cluster shares, and name them by absolute paths"
        )
    for name, size in found.files.items():
        if size <= SCANNED_BYTES and (line := secret_line((root / name).read_text(encoding="utf-8", errors="replace"))):
            raise UserError(
                f"{name}, line {line}: holds what looks like a key or a password, and is not uploaded; set it in the "
                f"environment of the cluster, or leave the file out with excludes in --runtime-env"
            )
    return found


def _walk(root: Path, named: Sequence[Path], output: PurePath | None, found: Upload) -> Iterator[Path]:
    """Files below root in order; hidden, temporary and foreign folders only where something in them is named."""
    for here, folders, files in os.walk(root):
        kept = []
        for name in sorted(folders):
            path = Path(here, name)
            wanted = any(one.is_relative_to(path) or path.is_relative_to(one) for one in named)
            own = PurePath(path.relative_to(root))
            if path.is_symlink():
                found.outside.append(own)
            elif wanted or not (
                name.startswith(".")
                or name in PASSED_OVER
                or name.endswith(".egg-info")
                or own == output
                or (path / "pyvenv.cfg").exists()
            ):
                kept.append(name)
        folders[:] = kept
        yield from (path for name in sorted(files) if (path := Path(here, name)).is_file() or path.is_symlink())


def _is_code(root: Path, relative: PurePath) -> bool:
    """Code, a configuration, or data of a package."""
    if relative.name.startswith("."):
        return False
    if any(fnmatchcase(relative.name, pattern) for pattern in CODE):
        return True
    if any(fnmatchcase(relative.name, pattern) for pattern in WEIGHTS):
        return False
    return any((root / folder / "__init__.py").is_file() for folder in [*relative.parents][:-1])


def _named(root: Path, values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(relative path, option) of what a configuration names below root."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if key or name not in ("run", "provenance"):
                yield from _named(root, value, f"{key}.{name}".lstrip("."))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _named(root, value, key)
    elif isinstance(values, str) and values and not os.path.isabs(values) and "\0" not in values and len(values) < 512:
        last = re.sub(r"\.\d+$", "", key).rsplit(".", 1)[-1]
        matches = [root / values]
        if _PATH_KEY.search(last) and any(letter in values for letter in "*?["):
            matches = sorted(root.glob(values))
        for path in matches:
            absolute = Path(os.path.normpath(path))
            there = absolute.is_file() or absolute.is_symlink() or (absolute.is_dir() and _PATH_KEY.search(last))
            if there and absolute != root and absolute.is_relative_to(root):
                yield str(absolute.relative_to(root)), key


def _inside(root: Path, path: Path) -> PurePath | None:
    """Where a path really leads, relative to root; None if that is elsewhere."""
    target = (root / path).resolve()
    return PurePath(target.relative_to(root)) if target.is_relative_to(root) else None
