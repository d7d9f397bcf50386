"""Evaluation without training: of a configuration's model, or of a run's newest checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dllm_rl.config.load import load_config
from dllm_rl.driver.build import build_run
from dllm_rl.errors import UserError
from dllm_rl.evaluation.evaluate import Evaluation, Record
from dllm_rl.reports.progress import Progress
from dllm_rl.reward_pool.self_test import run_self_test
from dllm_rl.storage import checkpoint


def evaluate_target(
    target: Path, overrides: Sequence[str], progress: Progress, samples: Path | None = None
) -> list[Evaluation]:
    """Held-out figures at every speed of evaluate.tokens_per_step.

    Args:
        target: a YAML file (its model is evaluated as it is), or a run folder (its configuration and the newest
            checkpoint, which must be intact).
        overrides: ``a.b=c`` on top of the configuration.
        progress: where to show progress.
        samples: every completion with its verdicts goes there, as JSON lines; None = into a run folder, as
            "eval-step-000040.jsonl", if it can be written, and of a YAML file nowhere.
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
            path = samples
            if samples is None and found is not None and os.access(target, os.W_OK):
                path = target / f"eval-{found.name}.jsonl"
            record = stack.enter_context(_recording(path)) if path is not None else lambda row: None
            return run.evaluate(pool, config.run.seed, progress, record)


@contextlib.contextmanager
def _recording(path: Path) -> Iterator[Record]:
    """Writes rows beside a file and puts them in its place at the end: a file that is there is whole.

    Raises:
        UserError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        file = unfinished.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"completions cannot be written to '{path}' ({error.strerror}); see --samples") from error
    with file:
        yield lambda row: print(json.dumps(row, ensure_ascii=False), file=file)
    os.replace(unfinished, path)
