"""Evaluation without training: of a configuration's model, or of a run's newest checkpoint."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dllm_rl.config.load import load_config
from dllm_rl.driver.build import build_run
from dllm_rl.errors import UserError
from dllm_rl.evaluation.evaluate import Evaluation
from dllm_rl.learner import checkpoint
from dllm_rl.reports.progress import Progress
from dllm_rl.reward_pool.self_test import run_self_test


def evaluate_target(target: Path, overrides: Sequence[str], progress: Progress) -> list[Evaluation]:
    """Held-out figures at every speed of evaluate.tokens_per_step.

    Args:
        target: a YAML file (its model is evaluated as it is), or a run folder (its configuration and the newest
            checkpoint, which must be intact).
        overrides: ``a.b=c`` on top of the configuration.
        progress: where to show progress.
    Raises:
        UserError: no such target, or a task without rewards.
    """
    found = None
    if target.is_dir():
        if not (target / "config.yaml").is_file():
            raise UserError(f"'{target}' is not a run folder: it has no config.yaml")
        found = checkpoint.find(target / "checkpoints", None)
    config = load_config(target / "config.yaml" if found else target, overrides)
    with tempfile.TemporaryDirectory() as scratch:  # a model made from scratch is not kept
        run = build_run(config, target if found else Path(scratch), progress, trains=False)
        with run, contextlib.ExitStack() as stack:
            if run.reward_pool is None:
                raise UserError(f"task '{config.data.task.name}' has no rewards: nothing says what counts as solved")
            pool = stack.enter_context(run.reward_pool)
            run_self_test(pool, run.task, run.task.examples("train")[: config.reward_pool.self_test])
            if found is not None:
                run.learner.load(found)
            run.weights.push()
            return run.evaluate(pool, config.run.seed, progress)
