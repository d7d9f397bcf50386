"""Exit codes: 0 done, 2 the user can fix it (one line, no traceback), 1 a crash or a run that stopped itself."""

from __future__ import annotations

import os
import sys
import traceback

from dllm_rl.errors import is_ours


def exit_code(error: BaseException) -> int:
    """Report an exception on stderr and say which exit code it means.

    A ValueError is the user's only if a raise statement of our code (or of a plugin) made it; one that comes out of a
    library, or out of C code that we called, is a bug and keeps its traceback.
    """
    if os.environ.get("DLLM_RL_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted; go on with the same command and --resume", 130)
    if isinstance(error, ValueError | FileNotFoundError | PermissionError | IsADirectoryError) and is_ours(error):
        return _say(str(error), 2)
    if isinstance(error, RuntimeError) and is_ours(error):
        return _say(str(error), 1)
    traceback.print_exception(error)
    return 1


def _say(text: str, code: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code
