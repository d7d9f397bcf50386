"""Exit codes: 0 done, 2 the user can fix it (one line, no traceback), 1 a crash or a run that stopped itself.

A run that stops itself may have a code of its own: 3 is a limit of section drift.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback

from dllm_rl.errors import RunStopped, UserError

# What the system refuses and a user can change, and how.
_SYSTEM = {
    errno.ENOTDIR: "a file is where a folder should be; name another folder (run.output), or move the file",
    errno.EEXIST: "a file is where a folder should be; name another folder (run.output), or move the file",
    errno.EACCES: "nobody may write or read there as this user; name another folder (run.output), or change its rights",
    errno.EPERM: "nobody may write or read there as this user; name another folder (run.output), or change its rights",
    errno.EROFS: "the file system is read-only; name another folder (run.output)",
    errno.ENOSPC: "the disk is full; free some space, then go on with --resume",
    errno.EDQUOT: "the quota is used up; free some space, then go on with --resume",
    errno.ENAMETOOLONG: "the name is too long; shorten it",
    errno.ELOOP: "its links lead in a circle; remove one of them",
}


def exit_code(error: BaseException) -> int:
    """Report an exception on stderr and say which exit code it means.

    The class decides, never the traceback: UserError, and files that the system refuses, are the user's.
    """
    if os.environ.get("DLLM_RL_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted; go on with the same command and --resume", 130)
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        return _say(f"{error.strerror}: '{error.filename}': {_SYSTEM[error.errno]}", 2)
    if isinstance(error, UserError | FileNotFoundError | PermissionError | IsADirectoryError):
        return _say(str(error), 2)
    if isinstance(error, RunStopped):
        return _say(str(error), error.exit_code)
    traceback.print_exception(error)
    return 1


def _say(text: str, code: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code
