"""Writing so that a crash leaves the old file or the new one, and a full disk is one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dllm_rl.errors import UserError, first_line

# What the system refuses and a user can change, and how.
ADVICE: Mapping[int, str] = {
    errno.ENOTDIR: "a file is where a folder should be; name another folder (run.output), or move the file",
    errno.EEXIST: "a file is where a folder should be; name another folder (run.output), or move the file",
    errno.EACCES: "nobody may write or read there as this user; name another folder (run.output), or change its rights",
    errno.EPERM: "nobody may write or read there as this user; name another folder (run.output), or change its rights",
    errno.EROFS: "the file system is read-only; name another folder (run.output)",
    errno.ENOSPC: "the disk is full; free some space, then go on with --resume",
    errno.EDQUOT: "the quota is used up; free some space, then go on with --resume",
    errno.ENAMETOOLONG: "the name is too long; shorten it",
    errno.ELOOP: "its links lead in a circle; remove one of them",
    errno.EIO: "the disk reports an error; look at it before anything else, then go on with --resume",
}
# How safetensors and torch.save report what the system refused: their exceptions carry no errno.
_REFUSED = re.compile(r"os error \d+|PytorchStreamWriter failed|file write failed")


def replace(path: Path, content: str | bytes) -> None:
    """Write a file in one rename; after a crash it holds what it held before, or the new content, whole."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder; whoever is interrupted leaves a hidden rest, never a folder that looks whole."""
    hidden = folder.with_name(f".removing-{folder.name}")
    if hidden.exists():
        shutil.rmtree(hidden)
    folder.rename(hidden)
    shutil.rmtree(hidden)


@contextmanager
def explained(what: str, place: Path, hint: str = "") -> Iterator[None]:
    """Turn what the system refuses (a full or read-only disk, a quota, an I/O error) into one line.

    Args:
        what: cannot be done, "checkpoint step-000040 cannot be written".
        place: where; its file system is asked for its free space.
        hint: what to do; else what ADVICE says.
    Raises:
        UserError: instead of such an error.
    """
    try:
        yield
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        advice = hint or ADVICE.get(getattr(error, "errno", None) or 0, "")
        raise UserError(
            "; ".join(part for part in (f"{what}: {reason}", _room(error, place), advice) if part)
        ) from error


def refusal(error: BaseException) -> str | None:
    """What the system has refused, or None for an error of another kind."""
    if isinstance(error, OSError) and error.errno in ADVICE:
        return f"{error.strerror}{f': {error.filename!r}' if error.filename else ''}"
    if not isinstance(error, UserError) and _REFUSED.search(str(error)):
        return first_line(error)
    return None


def _room(error: BaseException, place: Path) -> str:
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error)
    return f"{free / 2**30:.2f} GiB are free there" if full else ""
