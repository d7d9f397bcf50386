"""Errors: what a user can fix, runs that stop themselves, and packages that only some runs need."""

from __future__ import annotations

import importlib.util


class UserError(ValueError):
    """A configuration, file or plugin that the user can put right; its message says how, in one line (exit code 2)."""


class RunStopped(RuntimeError):
    """A run that cannot go on and knows why; its message says what to do next, in one line (exit code 1)."""


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
