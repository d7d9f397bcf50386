"""Errors: what a user can fix, and packages that only some runs need."""

from __future__ import annotations

import dis
import importlib.util
import os
from pathlib import Path
from types import TracebackType

_OURS = ("dllm_rl", "algorithms", "rollouts", "rewards")
_MARK = "raised_by_dllm_rl"


def mark(error: BaseException) -> None:
    """Note on the exception whose it is, before it leaves its process and loses its traceback."""
    setattr(error, _MARK, is_ours(error))


def is_ours(error: BaseException) -> bool:
    """Whether a raise statement of this project, or of code outside site-packages (a user's plugin), made the error."""
    marked: bool | None = getattr(error, _MARK, None)
    if marked is not None:
        return marked
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


def need(package: str, extra: str, what: str) -> None:
    """Refuse what cannot run without a package that is not installed.

    Args:
        package: what is imported.
        extra: of ours, that installs it.
        what: the setting or command that needs it.
    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what} needs {package}, which is not installed; pip install 'dllm-rl[{extra}]'")
