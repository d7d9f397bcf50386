"""Policy-gradient surrogates, divergences and named reductions, all element-wise in float32.

A *log ratio* here is the difference of two likelihood estimates under the same draws; for an ELBO it is not the log
of an importance ratio, which is why diagnostics report its spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dllm_rl.diffusion.advantage import group_sum, per_token
from dllm_rl.errors import UserError
from dllm_rl.types import Experience, GlobalCounts, LikelihoodEstimate, Loss, RolloutBatch

MAX_LOG_RATIO = 20.0  # nats; exp(89) is infinite in float32, and 0 times it NaN
Clip = Literal["ppo", "dual", "asymmetric", "unconditional", "none"]
Divergence = Literal["k1", "k2", "k3"]
Reduction = Literal["token_mean", "sequence_mean", "sequence_sum"]
Norm = Literal["none", "length", "canvas"]
Scope = Literal["completion", "canvas"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipping:
    """Options that every clipped loss shares: how far the ratio r = exp(new - old) may carry the gradient.

        ppo            min(r A, clip(r, 1 - epsilon, 1 + epsilon) A)
        asymmetric     the same with 1 + epsilon_high above
        dual           the same as ppo, and of negative advantages at least dual A: an outlier r cannot ruin the update
        unconditional  clip(r) A / mean of clip(r) over the group, as weights of the gradient, whatever the sign of A
        none           r A

    The noise of an estimated ratio passes the one-sided clip where A < 0. Normalised weights keep an update within the
    convex hull of its rows' gradients.

    Source: Schulman et al. 2017, arXiv:1707.06347, Eq. 7 (ppo); Yu et al. 2025, DAPO, arXiv:2503.14476 (asymmetric);
    Ye et al. 2020, arXiv:1912.09729 (dual); Zhong et al. 2026, StableDRL, arXiv:2603.06743 (unconditional).
    """

    epsilon: float = 0.2  # clip half-width of the ratio, dimensionless
    clip: Clip = "ppo"
    epsilon_high: float = 0.28  # above 1, for clip: asymmetric
    dual: float = 3.0  # largest ratio of negative advantages, for clip: dual
    max_log_ratio: float = MAX_LOG_RATIO  # nats; beyond it ratios are cut and have no gradient

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("epsilon", "epsilon_high", "max_log_ratio"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} = {getattr(self, name)}: must be > 0")
        if not self.dual > 1:
            raise UserError(f"dual = {self.dual}: must be > 1, the ratio of the old policy")

    @property
    def high(self) -> float:
        """Half-width above 1."""
        return self.epsilon_high if self.clip == "asymmetric" else self.epsilon

    def cut(self, log_ratio: Tensor) -> Tensor:
        """Log-ratios within what the exponential takes."""
        return log_ratio.clamp(-self.max_log_ratio, self.max_log_ratio)

    def gain(self, log_ratio: Tensor, advantage: Tensor, where: Tensor, group: Tensor) -> Tensor:
        """What is to be maximised, element-wise.

        Args:
            log_ratio: (N,) or (N, L) nats, differentiable.
            advantage: broadcasts with it.
            where: bool as log_ratio, which elements there are.
            group: (N,) int64; weights of "unconditional" are normalised over the elements of a group.
        """
        ratio = self.cut(log_ratio).exp()
        bounded = ratio.clamp(1 - self.epsilon, 1 + self.high)
        if self.clip == "none":
            return ratio * advantage
        if self.clip == "unconditional":
            weight = torch.where(where, bounded.detach(), 0.0)
            rows = (len(weight), -1)
            total, count = (group_sum(one.reshape(rows).sum(-1), group) for one in (weight, where.to(weight.dtype)))
            share = weight * (count / total.clamp(min=1e-30)).view(-1, *[1] * (weight.dim() - 1))
            # Its value is 0 and its derivative share * A: old and new differ by noise, which must not be rewarded.
            return share * advantage * (log_ratio - log_ratio.detach())
        gain = torch.minimum(ratio * advantage, bounded * advantage)
        if self.clip == "dual":
            gain = torch.where(advantage < 0, torch.maximum(gain, self.dual * advantage), gain)
        return gain

    def active(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """Bool: where the clip removes the gradient, or bounds the weight."""
        ratio = self.cut(log_ratio).exp()
        above, below = ratio > 1 + self.high, ratio < 1 - self.epsilon
        if self.clip == "none":
            return torch.zeros_like(above)
        if self.clip == "unconditional":
            return above | below
        cut = (advantage > 0) & above | (advantage < 0) & below
        return cut | ((advantage < 0) & (ratio > self.dual)) if self.clip == "dual" else cut


def clipped(log_ratio: Tensor, advantage: Tensor, epsilon_low: float, epsilon_high: float | None = None) -> Tensor:
    """min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), to be maximised; r = exp(log_ratio).

    Args:
        log_ratio: (...) nats.
        advantage: broadcasts with log_ratio.
        epsilon_low: clip half-width below 1.
        epsilon_high: above 1; None = epsilon_low.
    Source: Schulman et al. 2017, arXiv:1707.06347, Eq. 7.
    """
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    high = epsilon_low if epsilon_high is None else epsilon_high
    return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon_low, 1 + high) * advantage)


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
    if kind == "k3":  # beyond the bound it goes on as its tangent, so that it neither overflows nor lets go
        beyond = (-d - MAX_LOG_RATIO).clamp(min=0)
        return torch.expm1((-d).clamp(max=MAX_LOG_RATIO)) + math.exp(MAX_LOG_RATIO) * beyond + d
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
    log_ratio: Tensor, advantage: Tensor, epsilon: float | Clipping, where: Tensor, number: int
) -> dict[str, Tensor]:
    """What tells whether ratios can be trusted, as means that add up over shards; see derived_metrics.

    Args:
        log_ratio: (...) nats, of tokens, forwards or rows.
        advantage: broadcasts with it.
        epsilon: clip half-width, or how ratios are clipped.
        where: bool, which of them there are.
        number: how many there are in the whole global batch.
    """
    clip = epsilon if isinstance(epsilon, Clipping) else Clipping(epsilon=epsilon)

    def mean(value: Tensor) -> Tensor:
        return torch.where(where, value, 0.0).sum() / number

    log_ratio = log_ratio.detach()
    cut = clip.cut(log_ratio)
    return {
        "clip_fraction": mean(clip.active(log_ratio, advantage).float()),
        "log_ratio_mean": mean(log_ratio),
        "log_ratio_square": mean(log_ratio.square()),
        "log_ratio_cut": mean((cut != log_ratio).float()),
        "ratio_mean": mean(cut.exp()),
        "ratio_square": mean((2 * cut).exp()),
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
    epsilon: float | Clipping,
    beta: float,
    reduction: Reduction,
    anchor: LikelihoodEstimate | None = None,
) -> Loss:
    """The token-level GRPO loss, with the diagnostics that tell whether its log-ratios can be trusted.

        loss = - reduce( gain(r, A) - beta k3(l_new, l_anchor) ),   r = exp(l_new - l_old),   gain as in Clipping

    Args:
        new: current policy.
        experience: old policy, advantages, counts.
        epsilon: clip half-width, or how ratios are clipped.
        beta: weight of the divergence, per token; 0 = no anchor is read.
        reduction: how tokens become a scalar.
        anchor: what the divergence is taken to; None = experience.reference.
    """
    where = experience.batch.completion
    assert experience.advantage.dim() < 3, "advantages per draw need a loss over draws"
    advantage = per_token(experience.advantage)
    log_ratio = new.token_logp - experience.old.token_logp
    clip = epsilon if isinstance(epsilon, Clipping) else Clipping(epsilon=epsilon)
    gain = clip.gain(log_ratio, advantage, where, experience.batch.group)

    def mean(value: Tensor, kind: Reduction = "token_mean") -> Tensor:
        return reduce(value, where, kind, experience.counts)

    metrics = ratio_metrics(log_ratio, advantage, clip, where, experience.counts.num_tokens)
    if beta > 0:
        target = experience.reference if anchor is None else anchor
        assert target is not None, "beta > 0 means needs.reference"
        kl = divergence(new.token_logp, target.token_logp, "k3")
        metrics["kl"] = mean(kl.detach())
        gain = gain - beta * kl
    return Loss(-mean(gain, reduction), metrics)


def scored_tokens(batch: RolloutBatch, scope: Scope) -> Tensor:
    """(N, L) bool: the completion up to its end, or the whole canvas with what follows the end."""
    return batch.completion | batch.tail if scope == "canvas" else batch.completion


def sequence_logp(estimate: LikelihoodEstimate, experience: Experience, scope: Scope = "completion") -> Tensor:
    """(N,) nats: the estimate summed over each row's completion, or its whole canvas."""
    where = scored_tokens(experience.batch, scope)
    return torch.where(where, estimate.token_logp, torch.zeros_like(estimate.token_logp)).sum(-1)


def _divisor(batch: RolloutBatch, norm: Norm) -> Tensor | int:
    """(N,) tokens that a row's sum is divided by."""
    if norm == "none":
        return 1
    return scored_tokens(batch, "completion" if norm == "length" else "canvas").sum(-1)


def sequence_clipped_loss(
    new: LikelihoodEstimate,
    experience: Experience,
    *,
    epsilon: float | Clipping,
    beta: float,
    ratio_norm: Norm,
    loss_norm: Norm = "none",
    kind: Divergence = "k2",
    scope: Scope = "completion",
) -> Loss:
    """The sequence-level GRPO loss: a completion is one action, its likelihood one number B = sum_i l_i.

        loss = - sum_rows 1/c_out gain(r, A) / num_rows                                      gain as in Clipping
               + beta sum_rows 1/C D(B_new, B_ref) / num_rows,          r = exp((B_new - B_old) / c_in)

    Args:
        new: current policy.
        experience: old policy, reference, (N,) advantages, counts.
        epsilon: clip half-width, or how ratios are clipped; ratios of normalised likelihoods stay within 1e-2 of 1,
            where 0.2 never clips.
        beta: weight of the divergence, per token; 0 = the reference is not read.
        ratio_norm: c_in; "length" = the tokens of the row's completion, "canvas" = those of its canvas, "none" = 1.
        loss_norm: c_out, likewise.
        kind: divergence, taken on the raw sums and divided by C, the scored tokens.
        scope: which tokens B sums over; released code has the canvas, where a short answer is mostly its padding.
    """
    batch = experience.batch
    length = scored_tokens(batch, scope).sum(-1)
    advantage = experience.advantage
    assert advantage.dim() == 1, "one advantage per row: the sequence is one action"

    bound = sequence_logp(new, experience, scope)
    log_ratio = (bound - sequence_logp(experience.old, experience, scope)) / _divisor(batch, ratio_norm)
    clip = epsilon if isinstance(epsilon, Clipping) else Clipping(epsilon=epsilon)
    every = torch.ones_like(log_ratio, dtype=torch.bool)
    gain = clip.gain(log_ratio, advantage, every, batch.group) / _divisor(batch, loss_norm)
    number = experience.counts.num_rows  # a row is the unit of the ratio
    metrics = ratio_metrics(log_ratio, advantage, clip, every, number)
    if beta > 0:
        assert experience.reference is not None, "beta > 0 means needs.reference"
        kl = divergence(bound, sequence_logp(experience.reference, experience, scope), kind) / length
        metrics["kl"] = kl.detach().sum() / number
        gain = gain - beta * kl
    return Loss(-gain.sum() / number, metrics)
