"""Metrics of one batch of rollouts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dllm_rl.diffusion.advantage import any_of_group, zero_variance_groups
from dllm_rl.types import Rewards, RolloutBatch

CONFIDENT = math.log(0.9)  # the threshold of parallel decoding in Fast-dLLM, and what training can inflate


def rollout_metrics(batch: RolloutBatch, rewards: Rewards) -> dict[str, float]:
    """Means over rows of what was generated, and over samples (episodes, whatever their turns) of how it was scored.

    Args:
        batch: all rows, scored or not.
        rewards: their rewards.
    """
    ok = rewards.included
    length = batch.completion.sum(-1).float()
    flat = zero_variance_groups(rewards.total, batch.group, ok, batch.episode)
    metrics = {
        "failed_rows": _mean((~ok).float()),
        **({"timed_out_rows": rewards.status.count("timeout") / len(rewards.status)} if not bool(ok.all()) else {}),
        "zero_variance_groups": _share_of_groups(flat, batch.group),
        "all_wrong_groups": _share_of_groups(~any_of_group(rewards.solved, batch.group), batch.group),
        "hinted_rows": _mean(batch.hint.any(-1).float()),
        "unique_completions": _unique_share(batch),
        "completion_tokens": _mean(length),
        "tokens_per_forward": _mean(batch.tokens_per_forward),
        "behaviour_logp": _mean(batch.behaviour_logp[batch.completion]),
        "confidence": _mean(batch.behaviour_logp[batch.generated].exp()),
        "confident_tokens": _mean((batch.behaviour_logp[batch.generated] > CONFIDENT).float()),
    }
    if bool(ok.any()):
        total = _by_sample(rewards.total, batch, ok)
        metrics["success"] = _mean(_by_sample(rewards.solved.float(), batch, ok))
        metrics["reward"] = _mean(total)
        metrics["reward_deviation"] = _mean(_group_deviation(total, _by_sample(batch.group, batch, ok)))
    for name, value in rewards.components.items():
        applies = ok & ~value.isnan()
        if bool(applies.any()):
            metrics[f"reward/{name}"] = _mean(_by_sample(value, batch, applies))
    return metrics


def _by_sample(value: Tensor, batch: RolloutBatch, rows: Tensor) -> Tensor:
    """The mean over each sample's turns among some rows (N,) bool; one value per sample that has one."""
    value, episode = value[rows], batch.episode[rows]
    samples, place, size = episode.unique(return_inverse=True, return_counts=True)
    if len(samples) == len(value):
        return value
    return torch.zeros(len(samples)).index_add_(0, place, value.float()) / size


def _mean(value: Tensor) -> float:
    return value.double().mean().item()


def _group_deviation(reward: Tensor, group: Tensor) -> Tensor:
    return torch.stack([reward[group == g].std(correction=0) for g in group.unique()])


def _share_of_groups(flag: Tensor, group: Tensor) -> float:
    return _mean(torch.stack([flag[group == g].all() for g in group.unique()]).float())


def _unique_share(batch: RolloutBatch) -> float:
    scored = torch.where(batch.completion, batch.tokens, -1)
    keyed = torch.cat([batch.group[:, None], scored], dim=1)
    return len(keyed.unique(dim=0)) / len(keyed)
