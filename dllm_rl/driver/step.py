"""One optimiser step: a batch is taken, learned from, and the new weights are handed to the engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from dllm_rl import seeding
from dllm_rl.config.schema import Config
from dllm_rl.diffusion import masking
from dllm_rl.diffusion.advantage import scaled
from dllm_rl.diffusion.staleness import decoded_by_several, oldest_weights, truncated_weights
from dllm_rl.driver.build import Run
from dllm_rl.driver.check_answer import engine_error
from dllm_rl.driver.collect import Collected
from dllm_rl.driver.prefetch import RolloutPrefetcher
from dllm_rl.driver.reference_cache import ReferenceCache
from dllm_rl.driver.resample import kept
from dllm_rl.driver.step_masks import reference_masks, step_masks
from dllm_rl.errors import UserError
from dllm_rl.learner.diagnostics import estimator_metrics, rollout_gap, rounding_noise
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.reports.clock import Clock
from dllm_rl.reports.metrics import describe
from dllm_rl.types import RolloutBatch, TrainingBatch, rows_of

# Mean distance per token, nats, of log-probabilities of one network: rounding comes to 1e-6 in float32 and to a few
# hundredths in bfloat16; rows of other prompts to 1e-3 before a model has learned anything, and to whole nats then.
_GAP, _GAP_ROUNDED = 5e-4, 0.5


def one_step(
    run: Run, config: Config, prefetcher: RolloutPrefetcher, references: ReferenceCache
) -> tuple[Collected, dict[str, float], Clock]:
    """What was collected, the metrics of learning from it, and where the time went.

    Args:
        run: its parts.
        config: of the run.
        prefetcher: gives the batch.
        references: gives reference likelihoods.
    """
    timer, seed, algorithm, learner = Clock(), config.run.seed, run.algorithm, run.learner
    step = learner.step
    with timer("step_s"):
        with timer("wait_s"):
            collected = prefetcher.get(step)
        timer.add(Clock(collected.seconds))
        batch, rewards = collected.batch, collected.rewards
        learned: dict[str, float] = {}
        if config.rollout.max_staleness:
            learned["staleness"] = step - batch.weights_step[batch.generated].float().mean().item()
            if config.rollout.pause_blocks is not None:
                learned["paused_rows"] = decoded_by_several(batch).float().mean().item()
        advantage = algorithm.advantages(rewards, batch)
        keep = kept(run, config, rewards, batch).nonzero().flatten()
        learned["kept_rows"] = len(keep) / len(batch)
        if len(keep) == 0:
            learner.skip()
        else:
            batch, rewards, advantage = batch.select(keep), rewards.select(keep), rows_of(advantage, keep)
            masks = step_masks(algorithm, batch, config, step)
            with run.engines.asleep(timer):
                with timer("score_s"):
                    reference = references.of(batch, reference_masks(algorithm, batch, masks, config, step))
                    if config.rollout.correction is not None and (oldest_weights(batch) < step or not batch.exact):
                        batch, advantage, figures = _corrected(advantage, run, config, batch)
                        learned |= figures
                    elif algorithm.needs.behaviour_logp and not batch.exact:
                        raise UserError(
                            f"algorithm '{config.algorithm.name}' reads the rollouts' log-probabilities as the "
                            f"learner's own, and those of engine '{config.engine.name}' are approximate; set "
                            f"rollout.correction to token or sequence, or choose another engine"
                        )
                if step == 0 and config.model.dtype == "bfloat16" and "model" in algorithm.needs.trains:
                    rows, key = config.diagnostics.rows, seeding.derive(seed, "rounding", step)
                    learned["ratio_noise"] = rounding_noise(learner, algorithm, batch, rows, key)
                every = config.diagnostics.every_steps
                if every is not None and step % every == 0:
                    with timer("diagnose_s"):
                        if _replayable(run, batch, step):
                            learned |= rollout_gap(learner, batch, config.diagnostics.rows)
                            _require_exact(learned["rollout_gap"], batch, config)
                        key = seeding.derive(seed, "diagnostics", step)
                        learned |= estimator_metrics(learner, algorithm, batch, config.diagnostics, key)
                with timer("update_s"):
                    training = TrainingBatch(batch, rewards, advantage, masks, reference)
                    learned |= learner.update(training, algorithm)
                _require_declared(learned, algorithm, config)
        with timer("push_s"), prefetcher.engines_idle():
            run.weights.push()
    parts_of_it = ("wait_s", "sleep_s", "score_s", "diagnose_s", "update_s", "push_s")
    known = sum(timer.seconds.get(name, 0.0) for name in parts_of_it)
    timer.seconds["other_s"] = timer.seconds["step_s"] - known
    return collected, learned, timer


def _replayable(run: Run, batch: RolloutBatch, step: int) -> bool:
    """Whether log-probabilities of engine and learner can be compared: fresh rollouts of an engine that gives them."""
    needs = run.algorithm.needs
    fresh = needs.source == "rollouts" and "model" in needs.trains and oldest_weights(batch) == step
    return fresh and bool(batch.behaviour_logp.any()) and bool(batch.generated.any(-1).all())


def _require_exact(gap: float, batch: RolloutBatch, config: Config) -> None:
    """Log-probabilities that are said to be the learner's own must be: mixed rows and other weights show here alone."""
    rounded = config.model.dtype == "bfloat16" or torch.get_float32_matmul_precision() != "highest"
    limit = _GAP_ROUNDED if rounded else _GAP
    if batch.exact and not gap <= limit:
        raise engine_error(
            config.engine.name,
            f"says that its log-probabilities are the learner's (exact), and they are {gap:.2g} nats off per token "
            f"({limit} are allowed in {config.model.dtype}): it mixes rows, decodes with other weights or approximates",
        )


def _require_declared(learned: Mapping[str, float], algorithm: Algorithm, config: Config) -> None:
    try:
        for name in learned:
            describe(name, algorithm.metrics)
    except KeyError:
        raise UserError(
            f"algorithm '{config.algorithm.name}': loss() logs the metric '{name}', which is not declared; give its "
            f"unit and meaning in the class attribute 'metrics'"
        ) from None


def _corrected(
    advantage: Tensor, run: Run, config: Config, batch: RolloutBatch
) -> tuple[RolloutBatch, Tensor, dict[str, float]]:
    """The batch with the learner's own log-probabilities, and advantages weighted by their ratio to the engine's."""
    level = config.rollout.correction
    assert level is not None, "the caller asked"
    replay = masking.along_trajectory(batch.unmask_step, batch.generated, block_ids=batch.block_ids)
    plain = run.sampling.plain
    now = run.learner.score(batch, replay, sampling=None if plain else run.sampling).token_logp
    factor, figures = truncated_weights(now, batch, cap=config.rollout.correction_cap, level=level)
    advantage = scaled(advantage, factor.to(advantage.device, torch.float32))
    if run.algorithm.needs.behaviour_logp:
        now = now if plain else run.learner.score(batch, replay).token_logp
        batch = dataclasses.replace(
            batch, behaviour_logp=torch.where(batch.generated, now.float(), batch.behaviour_logp)
        )
    return batch, advantage, figures
