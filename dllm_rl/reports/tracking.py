"""Metrics to experiment trackers, beside metrics.jsonl, through accelerate's interface to them.

A tracker that fails is said once and left out from then on: it never stops training, and never loses a line of
metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dllm_rl.config.schema import Config
from dllm_rl.config.section import flatten
from dllm_rl.errors import require_package


class Trackers:
    """All trackers of a run. A context manager."""

    def __init__(self, config: Config, folder: Path, log: Callable[[str], None]) -> None:
        """Start them.

        Args:
            config: of the run; its section tracking names them.
            folder: for trackers that write files: its ``tracking`` folder.
            log: told what fails.
        Raises:
            UserError: a tracker whose package is not installed.
        """
        self._log = log
        self._live: dict[str, Any] = {}
        for name in config.tracking.to:
            require_package(name, name, f"tracking.to: {name}")
        for name in config.tracking.to:
            self._try(name, self._start, name, config, folder / "tracking")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass a row of metrics on."""
        for name in list(self._live):
            self._try(name, self._live[name].log, dict(values), step=step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self._live):
            self._try(name, self._live[name].finish)

    def _start(self, name: str, config: Config, folder: Path) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState(cpu=True)  # accelerate's trackers ask it whether this is the main process
        kind = LOGGER_TYPE_TO_CLASS[name]
        folder.mkdir(parents=True, exist_ok=True)
        run, project = config.run.name, config.tracking.project
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"run_name": run, "logging_dir": folder},
            "wandb": {"run_name": project, "name": run, "dir": str(folder)},
            "mlflow": {"experiment_name": project, "run_name": run},
            "trackio": {"run_name": project, "name": run},
        }
        tracker = kind(**options[name])
        tracker.start()
        tracker.store_init_configuration(_plain(config.model_dump()))
        self._live[name] = tracker

    def _try(self, name: str, action: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            action(*arguments, **options)
        except Exception as error:  # whatever a service or its client does must not end a run
            self._live.pop(name, None)
            reason = " ".join(str(error).split())[:200]
            self._log(f"tracker '{name}' failed and is left out from now on ({type(error).__name__}: {reason})")


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As section.key: value, with values that every tracker takes."""
    found = {key: value for key, value in flatten(settings).items() if value is not None}
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in found.items()}
