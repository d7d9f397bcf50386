"""Exit codes: 0 done, 2 the user can fix it (one line, no traceback), 1 a crash or a run that stopped itself."""

from __future__ import annotations

import dis
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType

_OURS = ("dllm_rl", "algorithms", "rollouts", "rewards")


def exit_code(error: BaseException) -> int:
    """Report an exception on stderr and say which exit code it means.

    A ValueError is the user's only if a raise statement of our code (or of a plugin) made it; one that comes out of a
    library, or out of C code that we called, is a bug and keeps its traceback.
    """
    if os.environ.get("DLLM_RL_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted; go on with the same command and --resume", 130)
    if isinstance(error, ValueError | FileNotFoundError | PermissionError | IsADirectoryError) and _is_ours(error):
        return _say(str(error), 2)
    if isinstance(error, RuntimeError) and _is_ours(error):
        return _say(str(error), 1)
    traceback.print_exception(error)
    return 1


def _say(text: str, code: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code


def _is_ours(error: BaseException) -> bool:
    """Whether a raise statement of this project, or of code outside site-packages (a user's plugin), made the error."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    if isinstance(error, OSError):  # the file system says no: the message names the file
        return True
    if last.tb_frame.f_code.co_code[last.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return False  # a call into C code failed
    module = str(last.tb_frame.f_globals.get("__name__", ""))
    if module.split(".")[0] in _OURS:
        return True
    path = Path(last.tb_frame.f_code.co_filename)
    standard = Path(os.__file__).parent
    return not ("site-packages" in path.parts or standard in path.parents)
