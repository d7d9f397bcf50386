"""Policy-gradient surrogates, divergences and named reductions, all element-wise in float32.

A *log ratio* here is the difference of two likelihood estimates under the same draws; for an ELBO it is not the log
of an importance ratio, which is why diagnostics report its spread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from dllm_rl.diffusion.advantage import per_token
from dllm_rl.types import Experience, GlobalCounts, LikelihoodEstimate, Loss

Divergence = Literal["k1", "k2", "k3"]
Reduction = Literal["token_mean", "sequence_mean", "sequence_sum"]
Norm = Literal["none", "length"]


def clipped(log_ratio: Tensor, advantage: Tensor, epsilon_low: float, epsilon_high: float | None = None) -> Tensor:
    """min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), to be maximised; r = exp(log_ratio).

    Args:
        log_ratio: (...) nats.
        advantage: broadcasts with log_ratio.
        epsilon_low: clip half-width below 1.
        epsilon_high: above 1; None = epsilon_low.
    Source: Schulman et al. 2017, arXiv:1707.06347, Eq. 7.
    """
    ratio = log_ratio.exp()
    high = epsilon_low if epsilon_high is None else epsilon_high
    return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon_low, 1 + high) * advantage)


def clip_active(log_ratio: Tensor, advantage: Tensor, epsilon_low: float, epsilon_high: float | None = None) -> Tensor:
    """Bool: where the clip removes the gradient (ratio beyond the bound on the side the advantage pushes to)."""
    high = epsilon_low if epsilon_high is None else epsilon_high
    ratio = log_ratio.exp()
    return ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - epsilon_low))


def divergence(new: Tensor, reference: Tensor, kind: Divergence) -> Tensor:
    """An estimate of KL(new || reference) at samples of new; d = new - reference, nats.

    k1 = d (unbiased, noisy),  k2 = d^2/2 (biased, right gradient),  k3 = exp(-d) - 1 + d (unbiased, non-negative).
    On sums over a sequence use k2: k3 explodes there and k1's gradient has mean zero (ESPO, arXiv:2512.03759).

    Source: Schulman 2020, "Approximating KL divergence".
    """
    d = new - reference
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"divergence = {kind!r}: must be one of {', '.join(get_args(Divergence))}")


def reduce(value: Tensor, where: Tensor, kind: Reduction, counts: GlobalCounts) -> Tensor:
    """Sum of value over scored tokens divided by a *global* count, so that shards and micro-batches add up.

    token_mean     sum / num_tokens          long completions weigh more
    sequence_mean  sum of row means / num_rows
    sequence_sum   sum / num_rows            every token weighs the same in every row (Dr. GRPO without a length bias)

    Args:
        value: (N, L).
        where: (N, L) bool.
        kind: one of the above.
        counts: of the whole global batch.
    """
    masked = torch.where(
        where, value, torch.zeros_like(value)
    )  # not value * where: inf or NaN off the mask must not leak
    if kind == "token_mean":
        return masked.sum() / counts.num_tokens
    if kind == "sequence_mean":
        return (masked.sum(-1) / where.sum(-1).clamp(min=1)).sum() / counts.num_rows
    if kind == "sequence_sum":
        return masked.sum() / counts.num_rows
    raise ValueError(f"reduction = {kind!r}: must be one of {', '.join(get_args(Reduction))}")


def ratio_metrics(
    log_ratio: Tensor, advantage: Tensor, epsilon: float, where: Tensor, number: int
) -> dict[str, Tensor]:
    """What tells whether ratios can be trusted, as means that add up over shards; see derived_metrics.

    Args:
        log_ratio: (...) nats, of tokens, forwards or rows.
        advantage: broadcasts with it.
        epsilon: clip half-width.
        where: bool, which of them there are.
        number: how many there are in the whole global batch.
    """

    def mean(value: Tensor) -> Tensor:
        return torch.where(where, value, 0.0).sum() / number

    log_ratio = log_ratio.detach()
    return {
        "clip_fraction": mean(clip_active(log_ratio, advantage, epsilon).float()),
        "log_ratio_mean": mean(log_ratio),
        "log_ratio_square": mean(log_ratio.square()),
        "ratio_mean": mean(log_ratio.exp()),
        "ratio_square": mean((2 * log_ratio).exp()),
    }


def derived_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a loss, with squares turned into what one reads.

    ``log_ratio_deviation`` is the spread of log-ratios over the batch in nats; ``effective_samples`` is Kish's
    effective sample size of the ratios as a share of their number, (mean r)^2 / mean r^2: 1 for the old policy.
    """
    out = dict(metrics)
    if "log_ratio_square" in out:
        variance = out.pop("log_ratio_square") - out["log_ratio_mean"] ** 2
        out["log_ratio_deviation"] = max(0.0, variance) ** 0.5
        out["effective_samples"] = out.pop("ratio_mean") ** 2 / max(out.pop("ratio_square"), 1e-30)
    return out


def clipped_loss(
    new: LikelihoodEstimate,
    experience: Experience,
    *,
    epsilon: float,
    beta: float,
    reduction: Reduction,
    anchor: LikelihoodEstimate | None = None,
) -> Loss:
    """The token-level GRPO loss, with the diagnostics that tell whether its log-ratios can be trusted.

        loss = - reduce( min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) - beta k3(l_new, l_anchor) )
        r = exp(l_new - l_old)

    Args:
        new: current policy.
        experience: old policy, advantages, counts.
        epsilon: clip half-width.
        beta: weight of the divergence, per token; 0 = no anchor is read.
        reduction: how tokens become a scalar.
        anchor: what the divergence is taken to; None = experience.reference.
    """
    where = experience.batch.completion
    assert experience.advantage.dim() < 3, "advantages per draw need a loss over draws"
    advantage = per_token(experience.advantage)
    log_ratio = new.token_logp - experience.old.token_logp
    gain = clipped(log_ratio, advantage, epsilon)

    def mean(value: Tensor, kind: Reduction = "token_mean") -> Tensor:
        return reduce(value, where, kind, experience.counts)

    metrics = ratio_metrics(log_ratio, advantage, epsilon, where, experience.counts.num_tokens)
    if beta > 0:
        target = experience.reference if anchor is None else anchor
        assert target is not None, "beta > 0 means needs.reference"
        kl = divergence(new.token_logp, target.token_logp, "k3")
        metrics["kl"] = mean(kl.detach())
        gain = gain - beta * kl
    return Loss(-mean(gain, reduction), metrics)


def sequence_logp(estimate: LikelihoodEstimate, experience: Experience) -> Tensor:
    """(N,) nats: the estimate summed over each row's completion."""
    return torch.where(experience.batch.completion, estimate.token_logp, torch.zeros_like(estimate.token_logp)).sum(-1)


def sequence_clipped_loss(
    new: LikelihoodEstimate,
    experience: Experience,
    *,
    epsilon: float,
    beta: float,
    ratio_norm: Norm,
    loss_norm: Norm = "none",
    kind: Divergence = "k2",
) -> Loss:
    """The sequence-level GRPO loss: a completion is one action, its likelihood one number B = sum_i l_i.

        loss = - sum_rows 1/c_out [ min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) ] / num_rows
               + beta sum_rows 1/C D(B_new, B_ref) / num_rows,          r = exp((B_new - B_old) / c_in)

    Args:
        new: current policy.
        experience: old policy, reference, (N,) advantages, counts.
        epsilon: clip half-width; ratios of normalised likelihoods stay within 1e-2 of 1, where 0.2 never clips.
        beta: weight of the divergence, per token; 0 = the reference is not read.
        ratio_norm: c_in; "length" = the row's number of scored tokens C, "none" = 1.
        loss_norm: c_out, likewise.
        kind: divergence, taken on the raw sums and divided by C.
    """
    where = experience.batch.completion
    length = where.sum(-1)
    advantage = experience.advantage
    assert advantage.dim() == 1, "one advantage per row: the sequence is one action"

    bound = sequence_logp(new, experience)
    log_ratio = (bound - sequence_logp(experience.old, experience)) / (length if ratio_norm == "length" else 1)
    gain = clipped(log_ratio, advantage, epsilon) / (length if loss_norm == "length" else 1)
    every = torch.ones_like(log_ratio, dtype=torch.bool)
    number = experience.counts.num_rows  # a row is the unit of the ratio
    metrics = ratio_metrics(log_ratio, advantage, epsilon, every, number)
    if beta > 0:
        assert experience.reference is not None, "beta > 0 means needs.reference"
        kl = divergence(bound, sequence_logp(experience.reference, experience), kind) / length
        metrics["kl"] = kl.detach().sum() / number
        gain = gain - beta * kl
    return Loss(-gain.sum() / number, metrics)
