"""Credit along a decoding trajectory: generalised advantage estimation over merged unmasking steps.

A step is a set of tokens committed together; its reward and value are the means over its tokens.

    R*_t = r*_t + g R*_{t+1}        delta*_t = r*_t - V*_t + g V*_{t+1}        A*_t = delta*_t + g lam A*_{t+1}
    token i of step t:   R_i = r_i + g R*_{t+1}        A_i = r_i - V_i + g V*_{t+1} + g lam A*_{t+1}

The reward of a row is put on the tokens of its last step. With g = lam = 1 this is R_i = R and A_i = R - V_i.

Source: Wang et al. 2025 (TraceRL), arXiv:2509.06949, diffusion value model.
"""

from __future__ import annotations

import torch
from torch import Tensor


def advantages_and_returns(
    reward: Tensor, value: Tensor, step: Tensor, scored: Tensor, *, discount: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Token-level advantages and value targets.

    Args:
        reward: (N,) float32, paid at the last step.
        value: (N, L) float32, predictions where scored.
        step: (N, L) int64 number of the (merged) step that committed the token, 0..T-1 in the order of time, where
            scored; every number up to a row's last occurs.
        scored: (N, L) bool, generated tokens.
        discount: g in [0, 1].
        smoothing: lam in [0, 1].
    Returns:
        (advantages, returns), both (N, L) float32, 0 where not scored.
    """
    steps = int(step[scored].max()) + 1
    place = torch.where(scored, step, steps)  # what is not scored falls into a bin that is dropped
    zeros = torch.zeros(len(reward), steps + 1, dtype=value.dtype, device=value.device)
    count = zeros.scatter_add(1, place, scored.to(value.dtype))[:, :steps]
    happened = count > 0
    pooled = zeros.scatter_add(1, place, torch.where(scored, value, torch.zeros_like(value)))[:, :steps]
    pooled = pooled / count.clamp(min=1)
    last = happened.sum(-1, keepdim=True) - 1  # (N, 1)
    paid = torch.zeros_like(pooled).scatter(1, last, reward[:, None].to(value.dtype))
    after = torch.zeros(len(reward), steps + 1, 3, dtype=value.dtype, device=value.device)  # R*, V*, A* of t + 1
    for t in range(steps - 1, -1, -1):
        total, following, advantage = after[:, t + 1].unbind(-1)
        here = torch.stack(
            [
                paid[:, t] + discount * total,
                pooled[:, t],
                paid[:, t] - pooled[:, t] + discount * following + discount * smoothing * advantage,
            ],
            dim=-1,
        )
        after[:, t] = torch.where(happened[:, t, None], here, torch.zeros_like(here))
    following = after[:, 1:].gather(1, step.masked_fill(~scored, 0)[..., None].expand(*step.shape, 3))
    own = torch.where(scored & (step == last), reward[:, None].to(value.dtype), torch.zeros_like(value))
    advantage = own - value + discount * following[..., 1] + discount * smoothing * following[..., 2]
    returns = own + discount * following[..., 0]
    return advantage.masked_fill(~scored, 0.0), returns.masked_fill(~scored, 0.0)


def value_error(new: Tensor, old: Tensor, target: Tensor, clip: float) -> Tensor:
    """Element-wise 1/2 max((V - R)^2, (V_clipped - R)^2), V_clipped within clip of the old prediction.

    Args:
        new: current predictions.
        old: predictions at the start of the update.
        target: returns.
        clip: half-width, in units of the reward.
    """
    clipped = old + (new - old).clamp(-clip, clip)
    return torch.maximum((new - target).square(), (clipped - target).square()) / 2
