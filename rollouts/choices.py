"""Distributions over which masked positions to commit: sampled from given uniforms, with exact log-probabilities.

None chooses nothing, so that a decoding forward is never wasted. Shapes: utilities (R, W) float; allowed (R, W)
bool, positions that may be chosen; order (R, W) int64, 0 where not chosen, else the place in the order of choice, from
1. Rows without an allowed position choose nothing, with log-probability 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dllm_rl.diffusion.decoding import take_best

_HALF_BITS = 1 << 26  # a 52-bit uniform number holds two independent 26-bit ones
_NEVER = float("-inf")
_FAR = -1e9  # a utility that is never chosen, and finite: -inf minus -inf would be NaN in gradients
_GRID = 1024  # steps per nat between which the guard does not tell utilities apart


def draw_bernoulli(utility: Tensor, allowed: Tensor, noise: Tensor) -> Tensor:
    """Choose each position with probability sigmoid(utility); if that chooses none, the one of highest utility.

    Args:
        utility: (R, W).
        allowed: (R, W) bool.
        noise: (R, W) float64 uniforms in (0, 1).
    Returns:
        order (R, W): chosen positions are numbered from the left.
    Source: "Bernoulli" of arXiv:2512.09106 with its argmax guard at every forward, not in evaluation only.
    """
    chosen = allowed & (noise < utility.double().sigmoid())
    return numbered(torch.where(chosen.any(-1, keepdim=True), chosen, _guard(utility, allowed)))


def bernoulli_logp(utility: Tensor, allowed: Tensor, order: Tensor) -> Tensor:
    """(R,) nats; log-probability of draw_bernoulli. The guard adds the probability of choosing none to its choice's.

    Args:
        utility: (R, W).
        allowed: (R, W) bool.
        order: (R, W) int64.
    """
    chosen = order > 0
    each = torch.where(chosen, logsigmoid(utility), logsigmoid(-utility))
    logp = each.masked_fill(~allowed, 0.0).sum(-1)
    none = logsigmoid(-utility).masked_fill(~allowed, 0.0).sum(-1)
    guarded = (chosen == _guard(utility.detach(), allowed)).all(-1) & allowed.any(-1)
    return torch.where(guarded, torch.logaddexp(logp, none), logp)


def draw_plackett_luce(utility: Tensor, allowed: Tensor, noise: Tensor) -> Tensor:
    """Choose one position after another, each in proportion to exp(utility), until STOP (utility 0) is drawn.

    The first draw is among positions alone. Two Gumbel variables per position are taken from its one uniform number;
    the first position has no use for its second, so STOP takes it.

    Args:
        utility: (R, W).
        allowed: (R, W) bool.
        noise: (R, W) float64 uniforms in (0, 1).
    Returns:
        order (R, W).
    Source: dynamic Plackett-Luce sampling, arXiv:2512.09106.
    """
    scaled = noise * _HALF_BITS
    first_noise, rest_noise = (scaled.floor() + 0.5) / _HALF_BITS, scaled.frac().clamp(1e-12, 1 - 1e-12)
    value = utility.double()
    best = (value + _gumbel(first_noise)).masked_fill(~allowed, _NEVER).argmax(-1, keepdim=True)
    rest = allowed.scatter(-1, best, False)
    perturbed = (value + _gumbel(rest_noise)).masked_fill(~rest, _NEVER)
    stop = _gumbel(rest_noise.gather(-1, best))
    after = rest & (perturbed > stop)
    rank = perturbed.masked_fill(~after, _NEVER).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    order = torch.where(after, rank + 2, 0).scatter(-1, best, 1)
    return order.masked_fill(~allowed, 0)


def plackett_luce_logp(utility: Tensor, allowed: Tensor, order: Tensor) -> Tensor:
    """(R,) nats; log-probability of draw_plackett_luce, of the choice in its order.

        log p = u_1 - LSE_A u + sum_{k>=2} [ u_k - LSE({u_j : j not chosen before} + {0}) ] - LSE({u_j : left} + {0})

    Args:
        utility: (R, W).
        allowed: (R, W) bool.
        order: (R, W) int64.
    """
    value = utility.masked_fill(~allowed, _NEVER)
    chosen = order > 0
    # Chosen positions in order, then the others: what is left before the k-th choice is a suffix of this arrangement.
    place = torch.where(chosen, order, order.shape[-1] + 1).argsort(dim=-1, stable=True)
    arranged, taken = value.gather(-1, place), chosen.gather(-1, place)
    left = arranged.flip(-1).logcumsumexp(-1).flip(-1)  # (R, W) LSE over positions that are left before each choice
    with_stop = torch.logaddexp(left, torch.zeros_like(left))
    any_allowed = allowed.any(-1)
    first = (arranged - torch.where(left == _NEVER, torch.zeros_like(left), left))[:, 0]
    first = torch.where(any_allowed, first, torch.zeros_like(first))
    later = torch.where(taken, arranged - with_stop, torch.zeros_like(left))[:, 1:].sum(-1)
    number = taken.sum(-1, keepdim=True)
    padded = torch.cat([with_stop, torch.zeros_like(with_stop[:, :1])], dim=-1)  # nothing left: STOP is certain
    return first + torch.where(any_allowed, later - padded.gather(-1, number).squeeze(-1), torch.zeros_like(later))


def draw_ranking(utility: Tensor, allowed: Tensor, noise: Tensor, count: Tensor) -> Tensor:
    """Choose a given number of positions one after another, each in proportion to exp(utility) among those left.

    Args:
        utility: (R, W).
        allowed: (R, W) bool.
        noise: (R, W) float64 uniforms in (0, 1).
        count: (R,) int64; all allowed positions if there are fewer.
    Returns:
        order (R, W).
    Source: the Plackett-Luce model of DCoLT, arXiv:2505.10446; drawn by Gumbel variables, whose order is its own.
    """
    perturbed = (utility.double() + _gumbel(noise)).masked_fill(~allowed, _NEVER)
    rank = perturbed.argsort(dim=-1, descending=True, stable=True).argsort(-1) + 1
    return torch.where(allowed & (rank <= count[:, None]), rank, 0)


def ranking_logp(utility: Tensor, allowed: Tensor, order: Tensor) -> Tensor:
    """(R,) nats; log-probability of draw_ranking, of the choice in its order; 0 if every allowed position was chosen.

        log p = sum_k [ u_k - LSE({u_j : j not chosen before k}) ]

    Args:
        utility: (R, W).
        allowed: (R, W) bool.
        order: (R, W) int64.
    """
    chosen = order > 0
    place = torch.where(chosen, order, order.shape[-1] + 1).argsort(dim=-1, stable=True)
    arranged, taken = utility.masked_fill(~allowed, _FAR).gather(-1, place), chosen.gather(-1, place)
    left = arranged.flip(-1).logcumsumexp(-1).flip(-1)
    logp = torch.where(taken, arranged - left, 0.0).sum(-1)
    return torch.where((chosen == allowed).all(-1), 0.0, logp)  # its order decides nothing


def numbered(chosen: Tensor) -> Tensor:
    """The order (R, W) int64 of a choice (R, W) bool that was made at once: numbered from the left."""
    return chosen.cumsum(-1) * chosen


def _guard(utility: Tensor, allowed: Tensor) -> Tensor:
    """(R, W) bool; the position of highest utility, the leftmost of those that differ by a network's rounding only.

    Without the grid, equal positions would be ordered by rounding errors, which depend on the other rows of a batch:
    scoring would take another position for the guard's than sampling did.
    """
    one = torch.ones(len(utility), dtype=torch.int64, device=utility.device)
    return take_best((utility * _GRID).round(), allowed, one)


def _gumbel(uniform: Tensor) -> Tensor:
    return -(-uniform.log()).log()
