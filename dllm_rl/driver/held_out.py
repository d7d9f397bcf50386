"""Held-out figures between the steps of a run: what completions are worth, and the loss of demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllm_rl import seeding
from dllm_rl.config.schema import Config
from dllm_rl.data.collate import completion_texts, supervised
from dllm_rl.driver.build import Run
from dllm_rl.driver.prefetch import RolloutPrefetcher
from dllm_rl.evaluation.evaluate import Evaluation, Unscored
from dllm_rl.protocols.engine import EVALUATE
from dllm_rl.reports.clock import Clock
from dllm_rl.reports.progress import Progress

_ROWS = 128  # that are scored at a time: the driver holds one such batch, whatever the size of the test split


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What was found.

    Attributes:
        evaluations: of decoded completions, one per speed; empty without reward functions.
        metrics: for metrics.jsonl.
        samples: of supervised runs, for samples.jsonl: what a few prompts are completed with, beside the reference.
    """

    evaluations: Sequence[Evaluation] = ()
    metrics: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]] = ()


def hold_out(
    run: Run, config: Config, prefetcher: RolloutPrefetcher, clock: Clock, progress: Progress
) -> HeldOut | None:
    """Evaluate the current weights; None (and a line for the user) if there is nothing to evaluate with.

    Args:
        run: its parts.
        config: of the run.
        prefetcher: keeps the engines for us meanwhile.
        clock: told how long it takes.
        progress: where to show progress.
    """
    if not run.held_out:
        progress.log("the task has no held-out examples: evaluation is left out")
        return None
    if run.reward_pool is None and not run.references:
        progress.log("no reward functions: held-out evaluation is left out")
        return None
    seed, metrics = config.run.seed, {}
    evaluations: Sequence[Evaluation] = ()
    with prefetcher.engines_idle(), clock("evaluate_s"):
        if run.reward_pool is not None:
            try:
                evaluations = run.evaluate(run.reward_pool, seed, progress)
            except Unscored as error:  # a step whose rewards all fail is survived too, and would otherwise go unsaved
                progress.log(f"held-out evaluation is left out: {error}")
            metrics = {name: value for e in evaluations for name, value in e.metrics().items()}
        samples = _samples(run, config) if run.algorithm.needs.source != "rollouts" else []
        if run.references:
            with run.engines.asleep(clock):
                metrics["eval/loss"] = reference_loss(run, config, progress)
    return HeldOut(evaluations=evaluations, metrics=metrics, samples=samples)


def reference_loss(run: Run, config: Config, progress: Progress) -> float:
    """Mean negative likelihood bound of the held-out reference completions, nats per token.

    Each row is divided by its own length, as in the loss of masked_sft by default. The draws are the
    algorithm's, keyed by the run seed alone: the same at every evaluation, so that differences are not noise of masks.

    Args:
        run: its parts; its learner scores.
        config: of the run.
        progress: where to show progress.
    """
    known = [prompt for prompt in run.held_out if prompt.uid in run.references]
    total = 0.0
    with progress.track("held-out loss", len(known)) as advance:
        for begin in range(0, len(known), _ROWS):
            part = known[begin : begin + _ROWS]
            batch = supervised(
                part,
                [run.references[prompt.uid] for prompt in part],
                run.denoiser,
                group=range(len(part)),
                max_new_tokens=run.sampling.max_new_tokens,
                pad_to_canvas=getattr(run.algorithm.config, "pad_to_canvas", False),
            )
            masks = run.algorithm.masks(batch, seeding.generator_for(config.run.seed, "held-out loss", begin))
            bound = run.learner.score(batch, masks).sequence_logp.double().cpu()
            total -= (bound / batch.completion.sum(-1)).sum().item()
            advance(len(part), "")
    return total / len(known)


def _samples(run: Run, config: Config) -> list[dict[str, Any]]:
    """Completions of the first held-out prompts, as they are decoded in evaluation."""
    prompts = run.held_out[: config.run.log_samples]
    if not prompts:
        return []
    seed = seeding.derive(config.run.seed, "evaluate")
    found = run.engines.generate(prompts, run.eval_samplings[0], seed=seed, role=EVALUATE)
    texts = completion_texts(found, run.tokenizer, special=True)
    return [
        {
            "uid": prompt.uid,
            "prompt": prompt.text,
            "completion": text,
            "reference": run.tokenizer.decode(list(run.references.get(prompt.uid, ()))),
            "answer": prompt.answer,
            "num_forwards": trajectory.num_forwards,
            "held_out": True,
        }
        for prompt, text, trajectory in zip(prompts, texts, found, strict=True)
    ]
