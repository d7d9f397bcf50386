"""Exit codes: 0 done, 2 the user can fix it (one line, no traceback), 1 a crash or a run that stopped itself.

A run that stops itself may have a code of its own: 3 is a limit of section drift.
"""

from __future__ import annotations

import os
import sys
import traceback

from dllm_rl.errors import RunStopped, UserError, first_line, is_out_of_memory
from dllm_rl.storage.files import ADVICE


def exit_code(error: BaseException) -> int:
    """Report an exception on stderr and say which exit code it means.

    The class decides, never the traceback: UserError, and files that the system refuses, are the user's.
    """
    if os.environ.get("DLLM_RL_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted; go on with the same command and --resume", 130)
    if isinstance(error, OSError) and error.errno in ADVICE:
        return _say(f"{error.strerror}: '{error.filename}'; {ADVICE[error.errno]}", 2)
    if isinstance(error, UserError | FileNotFoundError | PermissionError | IsADirectoryError):
        return _say(str(error), 2)
    if isinstance(error, RunStopped):
        return _say(str(error), error.exit_code)
    if is_out_of_memory(error):  # where no phase is known: tokenising, a checkpoint, the driver's own rows
        what = f"the process ran out of memory ({first_line(error) or type(error).__name__})"
        return _say(f"{what}; dllm-rl plan CONFIG says what a run needs, docs/memory.md what to lower", 1)
    traceback.print_exception(error)
    return 1


def _say(text: str, code: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code
