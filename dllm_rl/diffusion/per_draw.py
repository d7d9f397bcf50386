"""The GRPO loss of algorithms whose ratios are of single draws, not of likelihoods summed over draws."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_rl.diffusion import surrogate
from dllm_rl.diffusion.advantage import per_token
from dllm_rl.types import Experience, LikelihoodEstimate, Loss


def clipped_loss(
    new: LikelihoodEstimate,
    experience: Experience,
    *,
    epsilon: float | surrogate.Clipping,
    beta: float,
    reduction: surrogate.Reduction,
    kind: surrogate.Divergence = "k3",
    factor: Tensor | None = None,
) -> Loss:
    """The token-level GRPO loss with a ratio for each draw; the draws' weights stand outside of the clip.

        loss = - reduce( sum_k w_ki f_ki [ min(r_ki A, clip(r_ki, 1 - epsilon, 1 + epsilon) A) - beta D_ki ] )
        r_ki = exp(l_ki - l_old_ki),   l_ki = log p(x_i | x with mask k masked),   w_ki the weights of the draws
        D_ki = the divergence of l_ki from l_ref_ki

    With E sum_k w_ki = 1 it estimates the mean over tokens without bias, however few of them a draw scores.

    Args:
        new: current policy, with draw_token_logp (needs.draws).
        experience: old policy, reference, masks, counts; advantages (N,), (N, L) or (K, N, L).
        epsilon: clip half-width, or how ratios are clipped.
        beta: weight of the divergence from the reference, per token; 0 = it is not read.
        reduction: how tokens become a scalar.
        kind: divergence.
        factor: f, (K, N, L), what a token of a draw counts beyond its weight; None = 1. Metrics leave it out.
    """
    weight, counts = experience.masks.weight, experience.counts
    clip = epsilon if isinstance(epsilon, surrogate.Clipping) else surrogate.Clipping(epsilon=epsilon)
    value, logp = per_token(experience.advantage).expand_as(weight), _logp(new)
    log_ratio = logp - _logp(experience.old)  # 0 where nothing is scored, as the weight is

    def mean(each: Tensor) -> Tensor:
        return (weight * each).sum() / counts.num_tokens

    with torch.no_grad():
        cut = clip.cut(log_ratio)
        metrics = {
            "clip_fraction": mean(clip.active(log_ratio, value).float()),
            "log_ratio_mean": mean(log_ratio),
            "log_ratio_square": mean(log_ratio.square()),
            "log_ratio_cut": mean((cut != log_ratio).float()),
            "ratio_mean": mean(cut.exp()),
            "ratio_square": mean((2 * cut).exp()),
        }
    ratios, values, scored = (one.transpose(0, 1) for one in (log_ratio, value, weight != 0))  # groups are of rows
    gain = clip.gain(ratios, values, scored, experience.batch.group).transpose(0, 1)
    if beta > 0:
        assert experience.reference is not None, "beta > 0 means needs.reference"
        kl = surrogate.divergence(logp, _logp(experience.reference), kind)
        metrics["kl"] = mean(kl.detach())
        gain = gain - beta * kl
    each = (weight if factor is None else weight * factor) * gain
    return Loss(-surrogate.reduce(each.sum(0), experience.batch.completion, reduction, counts), metrics)


def _logp(estimate: LikelihoodEstimate) -> Tensor:
    assert estimate.draw_token_logp is not None, "needs.draws"
    return estimate.draw_token_logp
