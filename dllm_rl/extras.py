"""Packages that only some runs need, and that are installed with an extra of ours."""

from __future__ import annotations

import importlib.util


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
