"""Metrics of one batch of rollouts."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_rl.diffusion.advantage import any_of_group, zero_variance_groups
from dllm_rl.types import Rewards, RolloutBatch


def rollout_metrics(batch: RolloutBatch, rewards: Rewards) -> dict[str, float]:
    """Means over rows of what was generated and how it was scored.

    Args:
        batch: all rows, scored or not.
        rewards: their rewards.
    """
    ok = rewards.included
    length = batch.completion.sum(-1).float()
    metrics = {
        "failed_rows": _mean((~ok).float()),
        "zero_variance_groups": _share_of_groups(zero_variance_groups(rewards.total, batch.group, ok), batch.group),
        "all_wrong_groups": _share_of_groups(~any_of_group(rewards.solved, batch.group), batch.group),
        "hinted_rows": _mean(batch.hint.any(-1).float()),
        "unique_completions": _unique_share(batch),
        "completion_tokens": _mean(length),
        "tokens_per_forward": _mean(batch.tokens_per_forward),
        "behaviour_logp": _mean(batch.behaviour_logp[batch.completion]),
    }
    if bool(ok.any()):
        metrics["success"] = _mean(rewards.solved[ok].float())
        metrics["reward"] = _mean(rewards.total[ok])
        metrics["reward_deviation"] = _mean(_group_deviation(rewards.total[ok], batch.group[ok]))
    for name, value in rewards.components.items():
        applies = ok & ~value.isnan()
        if bool(applies.any()):
            metrics[f"reward/{name}"] = _mean(value[applies])
    return metrics


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
