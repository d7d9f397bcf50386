"""The training loop: one straight line from prompts to updated weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dllm_rl import seeding
from dllm_rl.cluster.group import Lost
from dllm_rl.cluster.usage import Meters
from dllm_rl.config.load import dump
from dllm_rl.config.schema import Config
from dllm_rl.diffusion.staleness import oldest_weights
from dllm_rl.driver.build import Parts, assemble
from dllm_rl.driver.collect import Collected
from dllm_rl.driver.prefetch import Ahead
from dllm_rl.driver.recovery import State, go_back, starting_point
from dllm_rl.driver.reference_cache import References
from dllm_rl.driver.step import one_step
from dllm_rl.evaluation.evaluate import Evaluation, evaluate
from dllm_rl.learner import checkpoint
from dllm_rl.reports.clock import Clock
from dllm_rl.reports.plot import plot_run
from dllm_rl.reports.progress import Progress, Quiet
from dllm_rl.reports.provenance import provenance
from dllm_rl.reports.run_folder import RunFolder
from dllm_rl.reports.tracking import Trackers
from dllm_rl.reward_pool.self_test import run_canary


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
        RuntimeError: more engines or learners were lost than cluster.max_restarts.
    """
    show, seed, total_steps = progress or Quiet(), config.run.seed, config.run.steps
    folder = Path(config.run.output) / config.run.name
    found = starting_point(config, folder, resume, from_checkpoint, show)
    clock = Clock()
    with ExitStack() as stack:
        trackers = Trackers(
            config.tracking.to,
            project=config.tracking.project,
            run=config.run.name,
            folder=folder,
            settings=config.model_dump(),
            say=show.say,
        )
        run = RunFolder(folder, stack.enter_context(trackers).log)
        with clock("setup_s"):
            parts = stack.enter_context(assemble(config, folder, show))
            learner, pool = parts.learner, parts.pool
            if pool is not None:
                stack.enter_context(pool)
                run_canary(pool, parts.task, parts.task.examples("train")[: config.reward_pool.canary])
            ahead = stack.enter_context(Ahead(parts, config))
            state = State(parts, ahead)
            if found is not None:
                state.load(found)
            parts.weights.verify()
            run.rewind(-1 if found is None else learner.step)
            run.write_config(dump(config.model_copy(update={"provenance": provenance()})))
            references = References(parts, config, folder)
            references.prepare(learner.step, total_steps, show)
        before: Sequence[Evaluation] = ()
        after: Sequence[Evaluation] = ()
        if config.evaluate.at_start and found is None:
            before = _hold_out(parts, ahead, run, clock, seed, show)
        advance = stack.enter_context(show.track("training", total_steps))
        advance(learner.step, "")

        meters, stopping = Meters(), False
        meters.read(parts.actors)
        while learner.step < total_steps and not stopping:
            step = learner.step
            try:
                collected, learned, timer = one_step(parts, config, ahead, references)
                run.log(learner.step, {**collected.metrics, **learned, **timer.seconds, **meters.read(parts.actors)})
                run.log_samples(learner.step, collected.samples[: config.run.log_samples])
                run.log_prompts(learner.step, collected.uids, oldest_weights(collected.batch))
                clock.add(timer)
                advance(1, _note(collected, learned))
                last, stopping = learner.step == total_steps, stop()
                if _due(learner.step, config.evaluate.every_steps) or (last and config.evaluate.at_end):
                    after = _hold_out(parts, ahead, run, clock, seed, show)
                if _due(learner.step, config.checkpoint.every_steps) or last or stopping:
                    with clock("checkpoint_s"):
                        counters = {"seconds": clock.seconds}
                        checkpoint.write(
                            run.checkpoints, learner.step, counters, state.save, keep=config.checkpoint.keep
                        )
            except Lost as lost:
                advance(go_back(state, run, lost, config, show) - step, "")
    plot_run(run.metrics(), run.path / "plot.png", title=config.run.name)
    return Summary(folder=folder, steps=learner.step, before=before, after=after, seconds=clock.seconds)


def _hold_out(
    parts: Parts, ahead: Ahead, run: RunFolder, clock: Clock, seed: int, show: Progress
) -> Sequence[Evaluation]:
    if parts.pool is None:
        show.say("no reward functions: held-out evaluation is left out")
        return ()
    if not parts.held_out:
        show.say("the task has no held-out examples: evaluation is left out")
        return ()
    results, total = [], len(parts.held_out) * len(parts.eval_samplings)
    with ahead.still(), clock("evaluate_s"), show.track("evaluating", total) as advance:
        for sampling in parts.eval_samplings:
            result = evaluate(
                parts.eval_engine,
                parts.pool,
                parts.held_out,
                parts.tokenizer,
                sampling,
                seed=seeding.derive(seed, "evaluate"),
                advance=advance,
            )
            results.append(result)
    run.log(parts.learner.step, {name: value for result in results for name, value in result.metrics().items()})
    return results


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _note(collected: Collected, learned: Mapping[str, float]) -> str:
    reward = collected.metrics.get("reward")
    if reward is not None:
        return f"reward {reward:.3f}" + ("" if "loss" in learned else ", no row kept")
    return f"loss {learned['loss']:.4f}"
