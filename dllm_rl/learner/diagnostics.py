"""How far likelihood estimates can be trusted: their spread over fresh draws of the masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dllm_rl import seeding
from dllm_rl.config.schema import DiagnosticsSection
from dllm_rl.diffusion import masking
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.protocols.learner import Learner
from dllm_rl.types import RolloutBatch


def redrawn(
    learner: Learner, algorithm: Algorithm, batch: RolloutBatch, *, seeds: Sequence[int], reference: bool = False
) -> Tensor:
    """(R, N) nats: each row's sequence log-likelihood under R independent draws of the algorithm's masks.

    Args:
        learner: scores.
        algorithm: draws.
        batch: N rows.
        seeds: of each draw.
        reference: score the reference instead.
    """
    return torch.stack(
        [
            learner.score(batch, algorithm.masks(batch, torch.Generator().manual_seed(seed)), reference=reference)
            .sequence_logp.double()
            .cpu()
            for seed in seeds
        ]
    )


def rounding_noise(learner: Learner, algorithm: Algorithm, batch: RolloutBatch, rows: int, seed: int) -> float:
    """Nats per token by which a row's likelihood differs when other rows are scored beside it; root mean square.

    Products of another shape are summed in another order, which bfloat16 shows: no log-ratio means anything below it.

    Args:
        learner: scores; its weights are not changed.
        algorithm: draws the masks.
        batch: rows of this step; the first ones are looked at.
        rows: how many.
        seed: of the draw.
    """
    few = batch.select(torch.arange(min(rows, len(batch))))
    masks = algorithm.masks(few, torch.Generator().manual_seed(seed))
    together = learner.score(few, masks).sequence_logp.double().cpu()
    alone = []
    for row in range(len(few)):
        one = torch.tensor([row])
        alone.append(learner.score(few.select(one), masks.select(one)).sequence_logp.double().cpu())
    off = (together - torch.cat(alone)) / few.completion.sum(-1).cpu()
    return off.square().mean().sqrt().item()


def rollout_gap(learner: Learner, batch: RolloutBatch, rows: int) -> dict[str, float]:
    """How far the engine's log-probabilities of its tokens are from the learner's, where both have the same weights.

    In float32 a few 1e-7 are left of it for block-causal families: the learner replays all blocks at once behind their
    clean copies, and scaled_dot_product_attention sums a row's keys in an order that depends on where they stand; all
    other kernels give the same bits. Replayed window by window, as it was decoded, a row differs by nothing
    (tests/learner/test_diagnostics.py), for as many forwards one after the other as decoding had.

    Args:
        learner: replays the states in which the tokens were committed; its weights are not changed.
        batch: rows of this step; the first ones are looked at.
        rows: how many.
    Returns:
        rollout_gap: mean absolute difference over generated tokens, nats.
        rollout_gap_max: the largest.
    """
    few = batch.select(torch.arange(min(rows, len(batch))))
    masks = masking.along_trajectory(few.unmask_step, few.generated, block_ids=few.block_ids)
    replayed = learner.score(few, masks).token_logp.float().cpu()
    gap = (replayed - few.behaviour_logp).abs()[few.generated]
    return {"rollout_gap": gap.mean().item(), "rollout_gap_max": gap.max().item()}


def advice(metrics: Mapping[str, float], algorithm: Algorithm) -> str:
    """One line if the clip of an algorithm is narrower than what rounding does to its ratios, else ""."""
    noise, epsilon = metrics.get("ratio_noise", 0.0), getattr(algorithm.config, "epsilon", float("inf"))
    if noise <= epsilon:
        return ""
    return (
        f"rounding moves log-ratios by {noise:.1e} nats per token, more than the clip of {epsilon:.1e}: it removes "
        f"gradients at random; set model.dtype: float32, or an algorithm.epsilon of {3 * noise:.0e} or more"
    )


def estimator_metrics(
    learner: Learner, algorithm: Algorithm, batch: RolloutBatch, settings: DiagnosticsSection, seed: int
) -> dict[str, float]:
    """Noise of the likelihood estimates of a few rows, under the current weights.

    Args:
        learner: scores; its weights are not changed.
        algorithm: draws the masks.
        batch: rows of this step; the first ones are looked at.
        settings: how many rows and draws.
        seed: of the draws.
    Returns:
        estimate_deviation: standard deviation of a row's sequence log-likelihood over draws, nats, root mean square
            over rows; 0 for estimators without randomness.
        estimate_deviation_per_token: the same divided by the row's scored tokens.
    """
    if "model" not in algorithm.needs.trains:
        return {}  # the log-probabilities of choices are exact
    few = batch.select(torch.arange(min(settings.rows, len(batch))))
    values = redrawn(
        learner, algorithm, few, seeds=[seeding.derive(seed, "redraw", i) for i in range(settings.redraws)]
    )
    variance = values.var(0)  # (N,), unbiased
    length = few.completion.sum(-1).cpu()
    return {
        "estimate_deviation": variance.mean().sqrt().item(),
        "estimate_deviation_per_token": (variance / length.square()).mean().sqrt().item(),
    }
