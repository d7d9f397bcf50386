"""The training loop: one straight line from prompts to updated weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dllm_rl.cluster.group import WorkerLost
from dllm_rl.cluster.usage import UsageMeter
from dllm_rl.config.load import dump
from dllm_rl.config.schema import Config
from dllm_rl.diffusion.staleness import oldest_weights
from dllm_rl.driver.build import Run, build_run
from dllm_rl.driver.collect import Collected
from dllm_rl.driver.drift import DriftGuard
from dllm_rl.driver.prefetch import RolloutPrefetcher
from dllm_rl.driver.recovery import State, recover, starting_point
from dllm_rl.driver.reference_cache import ReferenceCache
from dllm_rl.driver.step import one_step
from dllm_rl.errors import Drifted
from dllm_rl.evaluation.evaluate import Evaluation, Unscored
from dllm_rl.learner import checkpoint
from dllm_rl.learner.diagnostics import advice
from dllm_rl.reports.clock import Clock
from dllm_rl.reports.plot import plot_run
from dllm_rl.reports.progress import Progress, Quiet
from dllm_rl.reports.provenance import provenance
from dllm_rl.reports.run_folder import RunFolder
from dllm_rl.reports.tracking import Trackers
from dllm_rl.reward_pool.self_test import run_self_test


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a finished run has to say.

    Attributes:
        folder: the run folder.
        steps: finished optimiser steps.
        before: held-out evaluations before the first step (empty after a resume).
        after: held-out evaluations after the last step (empty if there was nothing left to do).
        seconds: wall time per phase.
    """

    folder: Path
    steps: int
    before: Sequence[Evaluation]
    after: Sequence[Evaluation]
    seconds: Mapping[str, float]


def train(
    config: Config,
    *,
    resume: bool = False,
    from_checkpoint: str | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Run a configuration to its last step.

    Args:
        config: the validated configuration.
        resume: go on from the newest checkpoint of the run folder.
        from_checkpoint: go on from this checkpoint instead, e.g. "step-000040".
        progress: where to show progress; None = nowhere.
        stop: asked between steps; once true, the run saves a checkpoint and returns.
    Raises:
        ValueError: a configuration, file or checkpoint that cannot be used, in one line.
        NonFiniteError: the loss or a gradient is not finite.
        PushError: weights did not reach an engine as they were sent.
        Drifted: a figure went beyond its limit in config.drift; a checkpoint is saved.
        RuntimeError: more engines or learners were lost than cluster.max_restarts.
    """
    progress, seed, total_steps = progress or Quiet(), config.run.seed, config.run.steps
    folder = Path(config.run.output) / config.run.name
    found = starting_point(config, folder, resume, from_checkpoint, progress)
    clock = Clock()
    with ExitStack() as stack:
        trackers = stack.enter_context(Trackers(config, folder, progress.log))
        records = RunFolder(folder, trackers.log)
        with clock("setup_s"):
            run = stack.enter_context(build_run(config, folder, progress))
            learner, pool, records.declared = run.learner, run.reward_pool, run.algorithm.metrics
            if pool is not None:
                stack.enter_context(pool)
                run_self_test(pool, run.task, run.task.examples("train")[: config.reward_pool.self_test])
            prefetcher = stack.enter_context(RolloutPrefetcher(run, config))
            drift = DriftGuard(config.drift)
            state = State(run, prefetcher, drift)
            if found is not None:
                state.load(found)
            run.weights.verify()
            records.rewind(-1 if found is None else learner.step)
            records.write_config(dump(config.model_copy(update={"provenance": provenance()})))
            references = ReferenceCache(run, config, folder)
            references.prepare(learner.step, total_steps, progress)
        before: Sequence[Evaluation] = ()
        after: Sequence[Evaluation] = ()
        if config.evaluate.at_start and found is None:
            before = _hold_out(run, prefetcher, records, clock, seed, progress)
        advance = stack.enter_context(progress.track("training", total_steps))
        advance(learner.step, "")

        meters, stopping = UsageMeter(), drift.verdict is not None
        meters.read(run.actors)
        while learner.step < total_steps and not stopping:
            step = learner.step
            try:
                collected, learned, timer = one_step(run, config, prefetcher, references)
                records.log(learner.step, {**collected.metrics, **learned, **timer.seconds, **meters.read(run.actors)})
                records.log_samples(learner.step, collected.samples[: config.run.log_samples])
                records.log_prompts(learner.step, collected.uids, oldest_weights(collected.batch))
                if text := advice(learned, run.algorithm):
                    progress.log(text)
                clock.add(timer)
                advance(1, _note(collected, learned))
                drift.observe(learner.step, collected.metrics)
                last, stopping = learner.step == total_steps, stop() or drift.verdict is not None
                if _due(learner.step, config.evaluate.every_steps) or (last and config.evaluate.at_end):
                    after = _hold_out(run, prefetcher, records, clock, seed, progress)
                if _due(learner.step, config.checkpoint.every_steps) or last or stopping:
                    with clock("checkpoint_s"):
                        counters = {"seconds": clock.seconds}
                        checkpoint.write(
                            records.checkpoints, learner.step, counters, state.save, keep=config.checkpoint.keep
                        )
            except WorkerLost as lost:
                advance(recover(state, records, lost, config, progress) - step, "")
    plot_run(records.metrics(), records.path / "plot.png", title=config.run.name)
    if drift.verdict is not None and learner.step < total_steps:
        raise Drifted(
            f"step {learner.step} is saved, and the run stops: {drift.verdict}; go on from an earlier checkpoint "
            f"(--from) with a lower learner.lr or sampling.strategy.max_tokens_per_step, or raise the limit"
        )
    return Summary(folder=folder, steps=learner.step, before=before, after=after, seconds=clock.seconds)


def _hold_out(
    run: Run, prefetcher: RolloutPrefetcher, records: RunFolder, clock: Clock, seed: int, progress: Progress
) -> Sequence[Evaluation]:
    if run.reward_pool is None:
        progress.log("no reward functions: held-out evaluation is left out")
        return ()
    if not run.held_out:
        progress.log("the task has no held-out examples: evaluation is left out")
        return ()
    with prefetcher.engines_idle(), clock("evaluate_s"):
        try:
            results = run.evaluate(run.reward_pool, seed, progress)
        except Unscored as error:  # a step whose rewards all fail is survived too, and would otherwise go unsaved
            progress.log(f"held-out evaluation is left out: {error}")
            return ()
    records.log(run.learner.step, {name: value for result in results for name, value in result.metrics().items()})
    return results


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _note(collected: Collected, learned: Mapping[str, float]) -> str:
    reward = collected.metrics.get("reward")  # absent if no row could be scored
    text = "" if reward is None else f"reward {reward:.3f}"
    if "loss" not in learned:
        return f"{text}, no row kept".removeprefix(", ")
    return text or f"loss {learned['loss']:.4f}"
