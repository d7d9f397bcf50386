"""Advantages from rewards, within groups of rows that share a prompt.

Baselines take float32 rewards (N,), group numbers (N,) int64 and which rows are included (N,) bool. Excluded rows
(a verifier failed) get advantage 0 and enter no statistic. What gives advantages gives one per row; algorithms may have
one per token, or per token of each draw, and the first functions here take all three shapes.

With ``episode`` (N,) int64, rows of one number are turns of one sample. A sample counts once in the statistics of its
group, however many turns it has: with the mean of its included rows' rewards. None = every row is a sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from dllm_rl.types import Rewards, RolloutBatch


def per_token(advantage: Tensor) -> Tensor:
    """Advantages (N,), (N, L) or (K, N, L) so that they broadcast with tokens (N, L) or (K, N, L)."""
    return advantage[:, None] if advantage.dim() == 1 else advantage


def per_row(advantage: Tensor) -> Tensor:
    """(N,) advantages summed over what else they have: tokens, draws and tokens."""
    return advantage if advantage.dim() == 1 else advantage.sum(-1).view(-1, advantage.shape[-2]).sum(0)


def scaled(advantage: Tensor, factor: Tensor) -> Tensor:
    """Advantages (N,), (N, L) or (K, N, L) times factors (N,) or (N, L)."""
    return advantage * factor if advantage.dim() == factor.dim() == 1 else per_token(advantage) * per_token(factor)


def group_mean(reward: Tensor, group: Tensor, included: Tensor, episode: Tensor | None = None) -> Tensor:
    """(N,) reward minus the mean of its group (Dr. GRPO: no division by the deviation)."""
    weight, size = _weights(group, included, episode)
    return _centred(reward, group, weight, size)


def leave_one_out(reward: Tensor, group: Tensor, included: Tensor, episode: Tensor | None = None) -> Tensor:
    """(N,) reward minus the mean of the *other* samples of its group: G/(G-1) (R - mean); 0 in groups of one.

    A turn whose reward is not its sample's mean m has  R - m + G/(G-1) (m - mean).
    """
    weight, size = _weights(group, included, episode)
    scale = torch.where(size > 1, size / (size - 1).clamp(min=1), torch.zeros_like(size))
    if episode is None:
        return _centred(reward, group, weight, size) * scale
    sample = group_sum(reward * weight, episode)
    return _centred(sample, group, weight, size) * scale + (reward - sample) * ((weight > 0) & (size > 1))


def z_score(reward: Tensor, group: Tensor, included: Tensor, episode: Tensor | None = None) -> Tensor:
    """(N,) group-centred reward over the population deviation of the group; 0 where all rewards are equal."""
    weight, size = _weights(group, included, episode)
    centred, size = _centred(reward, group, weight, size), size.clamp(min=1)
    deviation = (group_sum(centred**2 * weight, group) / size).sqrt()
    # Equal rewards may centre to a rounding error instead of 0: dividing by it would invent a signal.
    scale = group_sum((reward.abs() * weight), group) / size
    flat = deviation <= 1e-6 * scale.clamp(min=1e-6)
    return torch.where(
        flat, torch.zeros_like(centred), centred / torch.where(flat, torch.ones_like(deviation), deviation)
    )


def group_softmax(logit: Tensor, group: Tensor, included: Tensor, episode: Tensor | None = None) -> Tensor:
    """(N,) float32: G exp(logit) / sum of exp(logit) over the G included samples of the group; their mean is 1."""
    weight, size = _weights(group, included, episode)
    logit = logit.masked_fill(~included, float("-inf"))
    top = torch.full((int(group.max()) + 1,), float("-inf"), device=logit.device).scatter_reduce(
        0, group, logit, "amax"
    )
    odds = (logit - top[group]).exp().nan_to_num(0.0)  # -inf minus -inf, in a group without included rows
    return size * odds / group_sum(odds * weight, group).clamp(min=1e-30)


def per_component(
    components: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group: Tensor,
    included: Tensor,
    episode: Tensor | None = None,
) -> Tensor:
    """(N,) weighted sum of each component's own z-score, so that no component drowns another.

    Args:
        components: name -> (N,) rewards; NaN (not applicable) counts as the absence of that component.
        weights: name -> weight, for the components to use.
        group: (N,) int64.
        included: (N,) bool.
        episode: (N,) int64 or None.
    """
    total = torch.zeros_like(group, dtype=torch.float32)
    for name, weight in weights.items():
        value = components[name]
        applies = included & ~value.isnan()
        total = total + weight * z_score(value.nan_to_num(0.0), group, applies, episode)
    return total


def decoupled(rewards: Rewards, weights: Mapping[str, float], batch: RolloutBatch) -> Rewards:
    """The rewards with the weighted sum of each component's own z-score within its group as their total.

        R_i = sum_k w_k (R_ik - mean_g(R_k)) / std_g(R_k)

    What divides by the deviation of the sum gives (0, 1) and (0, 2) the same advantages; here a row that is right and
    well formed is further above a wrong one than a row that is right alone. For baselines that do not divide it is the
    division that keeps a component of large values from drowning the others. The sums have mean 0 in every group.

    Args:
        rewards: of the rows, with totals as the reward pool gives them.
        weights: of the components; 1 for one that is not listed, which the rollouter gave.
        batch: the rows.
    Source: Liu et al. 2026, arXiv:2601.05242; LightningRL, arXiv:2603.13319. Both divide by the deviation over the
        batch afterwards, which makes a row's advantage depend on other prompts; weights set the scale here.
    """
    known = {name: weights.get(name, 1.0) for name in rewards.components}
    total = per_component(rewards.components, known, batch.group, rewards.included, batch.episode)
    # Z-scores that cancel leave a rounding error, which is no signal.
    total = torch.where(total.abs() > 1e-6, total, 0.0)
    return dataclasses.replace(rewards, total=total, decoupled=True)


def normalised(rewards: Rewards, batch: RolloutBatch) -> Tensor:
    """(N,) z-scores of the total reward; decoupled rewards are the sum of their own, and stay as they are."""
    if rewards.decoupled:
        return rewards.total
    return z_score(rewards.total, batch.group, rewards.included, batch.episode)


def group_size(group: Tensor) -> Tensor:
    """(N,) float32: number of rows in the row's group."""
    return group_sum(torch.ones_like(group, dtype=torch.float32), group)


def any_of_group(flag: Tensor, group: Tensor) -> Tensor:
    """(N,) bool: whether the flag (N,) holds for some row of the row's group."""
    return group_sum(flag.to(torch.float32), group) > 0


def share_of_group(flag: Tensor, group: Tensor, included: Tensor, episode: Tensor | None = None) -> Tensor:
    """(N,) float32: share of the included samples of the row's group whose flag (N,) holds; 0 without any."""
    weight, size = _weights(group, included, episode)
    return group_sum(flag * weight, group) / size.clamp(min=1)


def spread_of_group(value: Tensor, group: Tensor, included: Tensor, episode: Tensor | None = None) -> Tensor:
    """(N,) float32: the largest minus the smallest value (N,) among the included samples of the row's group."""
    size = int(group.max()) + 1
    value = value.to(torch.float32)
    if episode is not None:
        value = group_sum(value * _weights(group, included, episode)[0], episode)
    high = torch.full((size,), float("-inf"), device=value.device)
    high = high.scatter_reduce(0, group, value.masked_fill(~included, float("-inf")), "amax")
    low = torch.full((size,), float("inf"), device=value.device)
    low = low.scatter_reduce(0, group, value.masked_fill(~included, float("inf")), "amin")
    return (high - low).clamp(min=0.0)[group]  # a group without included rows has no spread


def zero_variance_groups(reward: Tensor, group: Tensor, included: Tensor, episode: Tensor | None = None) -> Tensor:
    """(N,) bool: True for rows whose group gives no signal (all its included rewards are equal, or fewer than two)."""
    return group_sum((z_score(reward, group, included, episode) != 0).to(torch.float32), group) == 0


def group_sum(value: Tensor, group: Tensor) -> Tensor:
    """(N,) sum over each row's group, given back to its rows."""
    sums = torch.zeros(int(group.max()) + 1, dtype=value.dtype, device=value.device)
    return sums.index_add_(0, group, value)[group]


def _weights(group: Tensor, included: Tensor, episode: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N,) weights that sum to 1 over the included rows of a sample, and (N,) the samples of each row's group."""
    weight = included.to(torch.float32)
    if episode is not None:
        weight = weight / group_sum(weight, episode).clamp(min=1)
    return weight, group_sum(weight, group).round()  # thirds do not add up to 1, and one sample must not pass for more


def _centred(reward: Tensor, group: Tensor, weight: Tensor, size: Tensor) -> Tensor:
    mean = group_sum(reward * weight, group) / size.clamp(min=1)  # an empty group has no member
    return (reward - mean) * (weight > 0)
