"""dllm-rl from Python: the commands as functions, with objects where a configuration file has names."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_rl.config.load import dump, read_values, validate
from dllm_rl.config.schema import Config
from dllm_rl.driver.evaluate_target import evaluate_target
from dllm_rl.driver.export import export_model
from dllm_rl.driver.generate import Generation, Model, generate, load
from dllm_rl.driver.given import Rewards, Rows, with_given
from dllm_rl.evaluation.evaluate import Evaluation
from dllm_rl.reports.progress import Progress, Quiet
from dllm_rl.train import Summary
from dllm_rl.train import train as run

__all__ = ["Generation", "Model", "OnStep", "evaluate", "export", "generate", "load", "train"]

OnStep = Callable[[int, Mapping[str, float]], bool | None]  # (finished steps, metrics) -> True to stop the run
Source = str | Path | Mapping[str, Any] | Config
export = export_model


def train(
    config: Source,
    overrides: Sequence[str] = (),
    *,
    rewards: Rewards | None = None,
    dataset: Rows | None = None,
    test_dataset: Rows | None = None,
    callbacks: Sequence[OnStep] = (),
    resume: bool = False,
    from_checkpoint: str | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Train, as ``dllm-rl train`` does.

    Args:
        config: a YAML file, its sections as a dict, or a Config.
        overrides: "section.key=value" strings on top.
        rewards: in the place of section rewards: functions, names, or dicts with ``name`` (either) and options such as
            ``weight``. Functions of a module are named, others (of a notebook, lambdas) are copied into the run folder.
            The self-test is left out with functions, unless reward_pool.self_test is set.
        dataset: in the place of the task: rows with the columns of task rows, a ``datasets.Dataset``, or a file.
        test_dataset: the same, held out.
        callbacks: called with every row of metrics; one that returns True ends the run after the step, saved.
        resume: go on from the newest checkpoint.
        from_checkpoint: go on from this one.
        progress: where to show progress; None = nowhere.
    Raises:
        UserError: a configuration, file or object that cannot be used; and see train.train.
    """
    chosen = validate(with_given(_values(config, overrides), rewards=rewards, train=dataset, test=test_dataset))
    stopping = False

    def watch(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal stopping
        for callback in callbacks:
            stopping = bool(callback(step, dict(metrics))) or stopping

    return run(
        chosen,
        resume=resume,
        from_checkpoint=from_checkpoint,
        progress=progress,
        stop=lambda: stopping,
        watch=watch,
    )


def evaluate(
    target: Source,
    overrides: Sequence[str] = (),
    *,
    rewards: Rewards | None = None,
    dataset: Rows | None = None,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Held-out figures, as ``dllm-rl eval`` gives them.

    Args:
        target: a run folder (its newest checkpoint), or what train() takes (its model as it is).
        overrides: "section.key=value" strings on top, such as model.path=runs/mine.
        rewards: see train().
        dataset: held-out rows in the place of the task's.
        progress: where to show progress; None = nowhere.
    """
    is_run = isinstance(target, str | Path) and Path(target).is_dir()
    values = _values(Path(str(target)) / "config.yaml" if is_run else target, overrides)
    values = with_given(values, rewards=rewards, train=None, test=dataset)
    if is_run:
        chosen = validate(values).model_dump(mode="json", include={"data", "rewards", "reward_pool"})
        more = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
        return evaluate_target(Path(str(target)), [*overrides, *more], progress or Quiet())
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "config.yaml"
        file.write_text(dump(validate(values)), encoding="utf-8")
        return evaluate_target(file, [], progress or Quiet())


def _values(config: Source, overrides: Sequence[str]) -> dict[str, Any]:
    if isinstance(config, Config):  # what was not set stays open, so that with_given() can tell
        config = config.model_dump(mode="json", exclude_unset=True)
    return read_values(config, overrides)
