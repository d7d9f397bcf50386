"""What a plan that is refused leaves behind: nothing."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from dllm_rl.errors import UserError


def forget_refused(folder: Path, kind: object, error: object, traceback: object) -> None:
    """Remove the new model of a plan that is refused before it begins: the next plan may describe another one.

    Args:
        folder: of the run; once its config.yaml is written, the run has begun.
        kind: as of __exit__.
        error: what ended it.
        traceback: as of __exit__.
    """
    if isinstance(error, UserError) and not (folder / "config.yaml").exists():
        shutil.rmtree(folder / "initial", ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds something else
            folder.rmdir()
