"""Adapter folders as models: which base they sit on, and the two together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dllm_rl.errors import UserError

_CONFIG = "adapter_config.json"


def is_adapter(path: str | Path) -> bool:
    """Whether a path is a local folder that holds an adapter and no whole model."""
    folder = Path(path)
    return (folder / _CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_settings(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json of a folder.

    Raises:
        UserError: not a JSON object.
    """
    file = Path(folder) / _CONFIG
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return settings


def base_of(folder: str | Path) -> str:
    """Where the model below an adapter is: a local folder, or a name of the hub.

    A model that the run made itself is also found in the run folder, wherever that has been moved to.

    Raises:
        UserError: the adapter does not say, the folder is not there, or it holds another adapter.
    """
    folder = Path(folder)
    named = adapter_settings(folder).get("base_model_name_or_path")
    wanted = "set base_model_name_or_path in its adapter_config.json to a model folder or a hub name"
    if not isinstance(named, str) or not named:
        raise UserError(f"adapter '{folder}' does not say which model it is for; {wanted}")
    if Path(named).is_dir():
        if is_adapter(named):
            raise UserError(
                f"adapter '{folder}' sits on another adapter, '{named}'; make one model of that first: dllm-rl export "
                f"--merge {named} OUT; then {wanted}"
            )
        return named
    if Path(named).name == "initial" and len(folder.absolute().parents) > 2:
        beside = folder.absolute().parents[2] / "initial"  # RUN/checkpoints/step-000040/model
        if beside.is_dir():
            return str(beside)
    if named.startswith((".", "/", "~")) or named.count("/") != 1:
        raise UserError(f"adapter '{folder}': its base model '{named}' is not there; move it back, or {wanted}")
    return named
