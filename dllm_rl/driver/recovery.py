"""Where a run starts, and where it goes back to when learners are lost."""

from __future__ import annotations

from pathlib import Path

from dllm_rl.cluster.group import WorkerLost
from dllm_rl.config.load import resumable
from dllm_rl.config.schema import Config
from dllm_rl.driver.build import Run
from dllm_rl.driver.drift import DriftGuard
from dllm_rl.driver.prefetch import RolloutPrefetcher
from dllm_rl.errors import RunStopped, UserError
from dllm_rl.learner import checkpoint
from dllm_rl.reports.progress import Progress
from dllm_rl.reports.run_folder import RunFolder


def starting_point(
    config: Config, folder: Path, resume: bool, from_checkpoint: str | None, progress: Progress
) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Args:
        config: of the run.
        folder: the run folder.
        resume: go on from the newest one, if there is one.
        from_checkpoint: go on from this one.
        progress: told what is unusual.
    Raises:
        UserError: there is a run already, or no such checkpoint, or a damaged one.
    """
    root = folder / "checkpoints"
    if from_checkpoint is None and not resume:
        if (folder / "metrics.jsonl").exists():
            raise UserError(f"'{folder}' holds a run already; continue it with --resume, or set another run.name")
        return None
    if from_checkpoint is None and not checkpoint.names(root):
        progress.log(f"no checkpoint in '{root}' yet: starting from step 0")
        return None
    found = checkpoint.find(root, from_checkpoint)
    changes = resumable(folder / "config.yaml", config)
    if changes:
        progress.log(f"going on with another configuration: {'; '.join(changes)}")
    return found


class State:
    """What a checkpoint holds: the learner's state, batches that wait for it, and what drift is measured against."""

    def __init__(self, run: Run, prefetcher: RolloutPrefetcher, drift: DriftGuard) -> None:
        self.run, self.prefetcher, self.drift = run, prefetcher, drift

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        self.run.learner.save(folder)
        self.prefetcher.save(folder)
        self.drift.save(folder)

    def load(self, folder: Path) -> None:
        """Restore what save wrote."""
        self.run.learner.load(folder)
        self.prefetcher.load(folder, self.run.learner.step)
        self.drift.load(folder)


def recover(state: State, records: RunFolder, lost: WorkerLost, config: Config, progress: Progress) -> int:
    """Build lost learners anew and return to the newest checkpoint; returns its step.

    Raises:
        RunStopped: more was lost than cluster.max_restarts; what could be saved is saved.
    """
    run, learner = state.run, state.run.learner
    state.prefetcher.drop()
    try:
        learner.rebuild(lost)
    except WorkerLost as again:
        saved = ""
        if again.group != learner.group.name:  # the weights are still there
            checkpoint.write(records.checkpoints, learner.step, {}, state.save, keep=config.checkpoint.keep)
            saved = f"; step {learner.step} is saved"
        raise RunStopped(
            f"{again}; cluster.max_restarts = {config.cluster.max_restarts} are used up{saved}; find out why it dies, "
            f"then go on with --resume"
        ) from lost
    if checkpoint.names(records.checkpoints):
        state.load(checkpoint.find(records.checkpoints, None))
    run.weights.push(allow_older=True)
    records.rewind(learner.step)
    progress.log(f"{lost}; the learners were built anew and go on from step {learner.step}")
    return learner.step
