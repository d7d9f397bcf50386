"""Where a run starts, and where it goes back to when learners are lost."""

from __future__ import annotations

from pathlib import Path

from dllm_rl.cluster.group import Lost
from dllm_rl.config.load import resumable
from dllm_rl.config.schema import Config
from dllm_rl.driver.build import Parts
from dllm_rl.driver.prefetch import Ahead
from dllm_rl.learner import checkpoint
from dllm_rl.reports.progress import Progress
from dllm_rl.reports.run_folder import RunFolder


def starting_point(
    config: Config, folder: Path, resume: bool, from_checkpoint: str | None, show: Progress
) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Args:
        config: of the run.
        folder: the run folder.
        resume: go on from the newest one, if there is one.
        from_checkpoint: go on from this one.
        show: told what is unusual.
    Raises:
        ValueError: there is a run already, or no such checkpoint, or a damaged one.
    """
    root = folder / "checkpoints"
    if from_checkpoint is None and not resume:
        if (folder / "metrics.jsonl").exists():
            raise ValueError(f"'{folder}' holds a run already; continue it with --resume, or set another run.name")
        return None
    if from_checkpoint is None and not checkpoint.names(root):
        show.say(f"no checkpoint in '{root}' yet: starting from step 0")
        return None
    found = checkpoint.find(root, from_checkpoint)
    changes = resumable(folder / "config.yaml", config)
    if changes:
        show.say(f"going on with another configuration: {'; '.join(changes)}")
    return found


class State:
    """What a checkpoint holds: the learner's state, and batches that wait for it."""

    def __init__(self, parts: Parts, ahead: Ahead) -> None:
        self.parts, self.ahead = parts, ahead

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        self.parts.learner.save(folder)
        self.ahead.save(folder)

    def load(self, folder: Path) -> None:
        """Restore what save wrote."""
        self.parts.learner.load(folder)
        self.ahead.load(folder, self.parts.learner.step)


def go_back(state: State, run: RunFolder, lost: Lost, config: Config, show: Progress) -> int:
    """Build lost learners anew and return to the newest checkpoint; returns its step.

    Raises:
        RuntimeError: more was lost than cluster.max_restarts; what could be saved is saved.
    """
    parts, learner = state.parts, state.parts.learner
    state.ahead.drop()
    try:
        learner.rebuild(lost)
    except Lost as again:
        saved = ""
        if again.group != learner.group.name:  # the weights are still there
            checkpoint.write(run.checkpoints, learner.step, {}, learner.save, keep=config.checkpoint.keep)
            saved = f"; step {learner.step} is saved"
        raise RuntimeError(
            f"{again}; cluster.max_restarts = {config.cluster.max_restarts} are used up{saved}; find out why it dies, "
            f"then go on with --resume"
        ) from lost
    if checkpoint.names(run.checkpoints):
        state.load(checkpoint.find(run.checkpoints, None))
    parts.weights.push(back=True)
    run.rewind(learner.step)
    show.say(f"{lost}; the learners were built anew and go on from step {learner.step}")
    return learner.step
