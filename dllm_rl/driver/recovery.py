"""Where a run starts, and where it goes back to when learners are lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from dllm_rl.cluster.group import WorkerLost
from dllm_rl.config.load import resumable
from dllm_rl.config.schema import Config
from dllm_rl.driver.build import Run
from dllm_rl.driver.drift import DriftGuard
from dllm_rl.driver.prefetch import RolloutPrefetcher
from dllm_rl.errors import RunStopped, UserError
from dllm_rl.models.checkpoint import sampled_digest, weight_files
from dllm_rl.models.loading import checkpoint_folder
from dllm_rl.reports.progress import Progress
from dllm_rl.reports.run_folder import RunFolder
from dllm_rl.storage import checkpoint


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
    if root.is_dir():
        checkpoint.sweep(root)
    if from_checkpoint is None and not resume:
        if (folder / "metrics.jsonl").exists() or checkpoint.names(root):
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


def set_aside(records: RunFolder, step: int, progress: Progress) -> None:
    """Keep what the run has written after the step from which it goes on now (-1: from its start)."""
    aside = records.set_aside(step)
    if aside is not None:
        what = ", ".join(checkpoint.names(aside / "checkpoints")) or "the record of an attempt without checkpoint"
        progress.log(
            f"'{aside}' keeps {what}; it is a run folder of its own: to go on there, run.output={aside.parent} "
            f"run.name={aside.name} --resume"
        )


def origin(run: Run, config: Config, folder: Path) -> dict[str, str]:
    """What a run is made from and a configuration does not show: digests of its base model and of its prompts.

    The digest of a model is taken of samples of its files: another model differs everywhere.
    """
    files = list(weight_files(checkpoint_folder(run.denoiser.source, config.model.revision)))
    if run.denoiser.started_from:  # its weights are the reference
        files += Path(run.denoiser.started_from).glob("adapter_model.*")
    prompts = hashlib.blake2b(digest_size=16)
    for prompt in run.source.items:
        prompts.update(json.dumps([prompt.uid, list(prompt.token_ids), prompt.answer]).encode())
    return {"base": sampled_digest(files), "prompts": prompts.hexdigest()}


def check_origin(found: Path, now: Mapping[str, str], config: Config, progress: Progress) -> None:
    """Compare with what a checkpoint knows.

    Raises:
        UserError: its adapter belongs to another base model.
    """
    then = checkpoint.state(found)
    if then.get("base", now["base"]) != now["base"]:
        if config.model.lora is not None:
            raise UserError(
                f"'{found}' holds an adapter for another model than '{config.model.path}' is now: its weights have "
                f"changed since the run began; restore them, or start another run"
            )
        progress.log(f"the weights of '{config.model.path}' have changed since the run began: so has the reference")
    if then.get("prompts", now["prompts"]) != now["prompts"]:
        progress.log(
            f"the training prompts have changed since '{found.name}' was written: other rows, or another order"
        )


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
            records.save(learner.step, {}, state.save, keep=config.checkpoint.keep)
            saved = f"; step {learner.step} is saved"
        raise RunStopped(
            f"{again}; cluster.max_restarts = {config.cluster.max_restarts} are used up{saved}; find out why it dies, "
            f"then go on with --resume"
        ) from lost
    found = checkpoint.find(records.checkpoints, None) if checkpoint.names(records.checkpoints) else None
    if found is not None:
        state.load(found)
    run.weights.push(allow_older=True)
    records.rewind(found, learner.step)
    progress.log(f"{lost}; the learners were built anew and go on from step {learner.step}")
    return learner.step
