"""A disk that fails at its N-th operation: every write, rename and removal below a folder is counted.

What the process does through Python (open, write, fsync, rename, mkdir, unlink, rmdir) and through the two native
writers (safetensors, torch.save) passes here. A kill leaves half of the data of the operation, and nothing more reaches
the disk afterwards, whatever the dying code tries.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch

KINDS = ("kill", "ENOSPC", "EIO")


class Killed(BaseException):
    """The process would be gone."""


class FaultyDisk:
    """Counts operations below a folder, and fails one of them.

    Attributes:
        count: operations so far.
        names: of them, in order: "write metrics.jsonl".
    """

    def __init__(self, folder: Path, fail_at: int | None = None, kind: str = "kill") -> None:
        self.folder, self.fail_at, self.kind = os.path.realpath(folder), fail_at, kind
        self.count, self.dead, self.names = 0, False, []

    def _ours(self, path: object) -> bool:
        if not isinstance(path, str | os.PathLike):
            return False
        return os.path.realpath(path).startswith(self.folder + os.sep) or os.path.realpath(path) == self.folder

    def _operation(self, name: str, path: object) -> bool:
        """Whether this one fails; raises if the process is dead already."""
        if self.dead:
            raise Killed
        self.names.append(f"{name} {Path(os.fspath(path)).name}")
        self.count += 1
        return self.count == self.fail_at

    def _fail(self, path: object) -> None:
        if self.kind == "kill":
            self.dead = True
            raise Killed
        code = getattr(errno, self.kind)
        raise OSError(code, os.strerror(code), os.fspath(path))

    def _wrapped(self, module: object, name: str, which: int = 0):
        real = getattr(module, name)

        def call(*arguments, **options):
            path = arguments[which] if len(arguments) > which else None
            if self._ours(path) and self._operation(name, path):
                self._fail(path)
            return real(*arguments, **options)

        return mock.patch.object(module, name, call)

    def _native(self, module: object, name: str, which: int):
        """A writer whose own calls Python does not see: half of the file is there when it fails."""
        real = getattr(module, name)

        def call(*arguments, **options):
            path = arguments[which]
            if self._ours(path) and self._operation(name, path):
                real(*arguments, **options)
                os.truncate(path, os.path.getsize(path) // 2)
                self._fail(path)
            return real(*arguments, **options)

        return mock.patch.object(module, name, call)

    def _open(self, real):
        def call(file, mode="r", *arguments, **options):
            if not self._ours(file) or not set(mode) & set("wax+"):
                return real(file, mode, *arguments, **options)
            if self._operation("open", file):
                self._fail(file)
            return _Counted(self, real(file, mode, *arguments, **options), file)

        return call

    @contextmanager
    def attached(self) -> Iterator[FaultyDisk]:
        """In use inside."""
        opened, fsync = io.open, os.fsync

        def synced(descriptor):
            place = os.readlink(f"/proc/self/fd/{descriptor if isinstance(descriptor, int) else descriptor.fileno()}")
            if self._ours(place) and self._operation("fsync", place):
                self._fail(place)
            return fsync(descriptor)

        with ExitStack() as stack:
            for name, which in (("replace", 1), ("rename", 1), ("mkdir", 0), ("truncate", 0)):
                stack.enter_context(self._wrapped(os, name, which))
            for name in ("unlink", "remove", "rmdir"):
                stack.enter_context(self._removal(name))
            stack.enter_context(mock.patch.object(builtins, "open", self._open(opened)))
            stack.enter_context(mock.patch.object(io, "open", self._open(opened)))
            stack.enter_context(mock.patch.object(os, "fsync", synced))
            stack.enter_context(self._native(torch, "save", 1))
            stack.enter_context(self._native(safetensors.torch, "serialize_file", 1))
            yield self

    def _removal(self, name: str):
        """shutil.rmtree names files by the descriptor of their folder."""
        real = getattr(os, name)

        def call(path, *arguments, **options):
            folder = options.get("dir_fd")
            place = path if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
            if self._ours(place) and self._operation(name, place):
                self._fail(place)
            return real(path, *arguments, **options)

        return mock.patch.object(os, name, call)


class _Counted:
    """A file whose writes are counted; half of the data is there when one fails."""

    def __init__(self, disk: FaultyDisk, file, path) -> None:
        self._disk, self._file, self._path = disk, file, path

    def write(self, data):
        if self._disk._operation("write", self._path):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._disk._fail(self._path)
        return self._file.write(data)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def truncate(self, size=None):
        if self._disk._operation("truncate", self._path):
            self._disk._fail(self._path)
        return self._file.truncate(size)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __iter__(self):
        return iter(self._file)

    def __getattr__(self, name):
        return getattr(self._file, name)
