"""Experiment trackers: rows arrive, and a tracker that fails is said and left out."""

from __future__ import annotations

import sys
import types
from typing import ClassVar

import pytest

from dllm_rl.config.load import validate
from dllm_rl.reports.run_folder import RunFolder, read_rows
from dllm_rl.reports.tracking import Trackers


class Recorder:
    """A tracker that keeps what it is told, and fails where it is told to."""

    made: ClassVar[list[Recorder]] = []
    fail = ""

    def __init__(self, **options):
        self.options, self.rows, self.settings, self.finished = options, [], {}, False
        Recorder.made.append(self)
        self._maybe("init")

    def _maybe(self, where):
        if where == Recorder.fail:
            raise ConnectionError(f"no route to host\nin {where}")

    def start(self):
        self._maybe("start")

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step):
        self._maybe("log")
        self.rows.append((step, values))

    def finish(self):
        self._maybe("finish")
        self.finished = True


def tracked_by(name):
    return validate(
        {
            "run": {"name": "r", "steps": 1},
            "model": {"path": "m"},
            "data": {"task": {"name": "sudoku4"}},
            "algorithm": {"name": "masked_sft"},
            "tracking": {"to": [name], "project": "p"},
        }
    )


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    import accelerate.tracking

    Recorder.made, Recorder.fail = [], ""
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    package = types.ModuleType("wandb")
    package.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "wandb", package)
    said = []

    def make():
        return Trackers(tracked_by("wandb"), tmp_path, said.append)

    return make, said


def test_rows_and_settings_arrive(recorded, tmp_path):
    make, said = recorded
    with make() as trackers:
        run = RunFolder(tmp_path, trackers.log)
        run.log(1, {"loss": 0.5})
        run.log(2, {"loss": 0.25})
    (one,) = Recorder.made
    assert one.rows == [(1, {"loss": 0.5}), (2, {"loss": 0.25})] and one.finished and not said
    assert one.settings["run.name"] == "r" and one.settings["tracking.to"] == "['wandb']"
    assert "run.threads" not in one.settings, "null is left out"
    assert one.options["run_name"] == "p" and one.options["name"] == "r"


@pytest.mark.parametrize("where", ["init", "start", "log", "finish"])
def test_one_that_fails_is_said_once_and_nothing_is_lost(recorded, tmp_path, where):
    make, said = recorded
    Recorder.fail = where
    with make() as trackers:
        run = RunFolder(tmp_path, trackers.log)
        for step in range(3):
            run.log(step, {"loss": 0.5})
    assert said == [
        f"tracker 'wandb' failed and is left out from now on (ConnectionError: no route to host in {where})"
    ]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_one_that_is_not_installed_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"tracking.to: mlflow needs mlflow, which is not installed; pip install 'dllm-rl\[mlflow\]'"
    ):
        Trackers(tracked_by("mlflow"), tmp_path, print)
