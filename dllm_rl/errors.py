"""Errors: what a user can fix, runs that stop themselves, and packages that only some runs need."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from typing import ClassVar


class UserError(ValueError):
    """A configuration, file or plugin that the user can put right; its message says how, in one line (exit code 2)."""


class RunStopped(RuntimeError):
    """A run that cannot go on and knows why; its message says what to do next, in one line (exit code 1).

    Attributes:
        exit_code: of the command.
    """

    exit_code: ClassVar[int] = 1


class Drifted(RunStopped):
    """A run that went beyond a limit of its section drift, and has saved a checkpoint (exit code 3)."""

    exit_code = 3


class PushError(RunStopped):
    """A push of weights that did not arrive as it was sent."""


class DroppedBucket(PushError):
    """Weights were announced and did not come."""


class StaleVersion(PushError):
    """Older weights than those that are there."""


class UnknownWeight(PushError):
    """A name or a shape that the receiver does not have."""


class DigestMismatch(PushError):
    """The receiver holds other values than the sender."""


class PushTimeout(PushError):
    """A worker did not finish its part in time."""


def nearest(name: str, known: Iterable[str], *, where: str = "", list_known: bool = True) -> str:
    """A hint for an unknown name: "; nearest is 'x'", or else what is known.

    Args:
        name: the unknown one.
        known: the right ones.
        where: put before each of them, "learner." for example.
        list_known: say all of them if none is near; else nothing.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"; nearest is '{where}{near[0]}'"
    return f"; known: {', '.join(where + one for one in known) or 'none'}" if list_known else ""


def first_line(error: BaseException) -> str:
    """What another library says, in one line of at most 160 characters."""
    return str(error).strip().split("\n")[0][:160]


def require_package(package: str, extra: str, what: str) -> None:
    """Refuse what cannot run without a package that is not installed.

    Args:
        package: what is imported.
        extra: of ours, that installs it.
        what: the setting or command that needs it.
    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs {package}, which is not installed; pip install 'dllm-rl[{extra}]'")
