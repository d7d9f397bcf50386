"""Which software produced a run."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("dllm-rl", "torch", "transformers", "peft", "datasets", "tokenizers", "numpy", "math-verify")


def provenance() -> dict[str, Any]:
    """Versions of what matters and the git revision of the source, with "+changes" if the tree is dirty."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"python": platform.python_version(), "versions": versions, "git": _revision()}


def _revision() -> str:
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    if not (root / ".git").exists():
        return "not a git checkout"  # installed from a wheel: the version above says what it is
    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
