"""Metrics to experiment trackers, beside metrics.jsonl, through accelerate's interface to them.

A tracker that fails is said once and left out from then on: it never stops training, and never loses a line of
metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_rl.config.section import flatten
from dllm_rl.errors import require_package

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


class Trackers:
    """All trackers of a run. A context manager."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        project: str,
        run: str,
        folder: Path,
        settings: Mapping[str, Any],
        log: Callable[[str], None],
    ) -> None:
        """Start them.

        Args:
            names: keys of PACKAGES.
            project: groups runs, where a tracker knows such a thing.
            run: name of the run.
            folder: for trackers that write files: its ``tracking`` folder.
            settings: the configuration.
            log: told what fails.
        Raises:
            UserError: a tracker whose package is not installed.
        """
        self._log = log
        self._live: dict[str, Any] = {}
        for name in names:
            require_package(PACKAGES[name], name, f"tracking.to: {name}")
        for name in names:
            self._try(name, self._start, name, project, run, folder / "tracking", settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass a row of metrics on."""
        for name in list(self._live):
            self._try(name, self._live[name].log, dict(values), step=step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self._live):
            self._try(name, self._live[name].finish)

    def _start(self, name: str, project: str, run: str, folder: Path, settings: Mapping[str, Any]) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState(cpu=True)  # accelerate's trackers ask it whether this is the main process
        kind = LOGGER_TYPE_TO_CLASS[name]
        folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"run_name": run, "logging_dir": folder},
            "wandb": {"run_name": project, "name": run, "dir": str(folder)},
            "mlflow": {"experiment_name": project, "run_name": run},
            "trackio": {"run_name": project, "name": run},
        }
        tracker = kind(**options[name])
        tracker.start()
        tracker.store_init_configuration(_plain(settings))
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
