"""Decoding mathematics shared by every engine: proposing a token per masked position, choosing positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_rl.types import Sampling

# Roles of the counter-based uniforms of a (row, forward, position).
TOKEN_NOISE = 1
POSITION_NOISE = 2


@dataclass(frozen=True, slots=True)
class Proposals:
    """One token per position, with what strategies rank positions by.

    Attributes:
        token: (M,) int64.
        logp: (M,) float32 nats; of the token under the untempered distribution without the mask token.
        entropy: (M,) float32 nats of that distribution.
        margin: (M,) float32; its largest minus its second largest probability.
    """

    token: Tensor
    logp: Tensor
    entropy: Tensor
    margin: Tensor


def propose(logits: Tensor, sampling: Sampling, uniform: Tensor, *, mask_id: int) -> Proposals:
    """Propose a token for every row of logits: the most likely one, or one drawn by inverting the distribution.

    One uniform number decides a token, so that a draw depends on its own counter alone.

    Args:
        logits: (M, V).
        sampling: temperature (0 = greedy), top_k, top_p: applied to the tempered distribution, in that order.
        uniform: (M,) float64 in (0, 1); unused when greedy.
        mask_id: the mask token; it has probability zero.
    """
    logits = logits.float().index_fill(-1, torch.tensor([mask_id], device=logits.device), float("-inf"))
    logp = logits - logits.logsumexp(-1, keepdim=True)
    probability = logp.exp()
    entropy = -(probability * logp.masked_fill(probability == 0, 0.0)).sum(-1)  # 0 log 0 = 0
    best_two = probability.topk(2, dim=-1).values
    if sampling.temperature == 0:
        token = logits.argmax(-1)  # the first of equals, which topk does not promise; bfloat16 logits tie often
    else:
        token = _invert(_filtered(logits / sampling.temperature, sampling), uniform)
    return Proposals(
        token=token,
        logp=logp.gather(-1, token[:, None]).squeeze(-1),
        entropy=entropy,
        margin=best_two[:, 0] - best_two[:, 1],
    )


def _filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits with everything outside top_k, then outside top_p, at -inf; of equal logits the lower ids are kept."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        above, tied = logits > smallest, logits == smallest
        room = sampling.top_k - above.sum(-1, keepdim=True)
        logits = logits.masked_fill(~(above | (tied & (tied.cumsum(-1) <= room))), float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability
        outside = before >= sampling.top_p  # the token that crosses p is kept, so at least one always is
        logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits


def _invert(logits: Tensor, uniform: Tensor) -> Tensor:
    # float64: at V = 126,464 a float32 running sum would misplace rare tokens.
    cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def take_best(score: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """Per row, the `count` eligible positions of highest score; ties go to the left.

    Args:
        score: (N, W).
        eligible: (N, W) bool.
        count: (N,) int64.
    Returns:
        (N, W) bool.
    """
    # -inf is a legal score, and eligible positions must still come before visible ones.
    ranked = score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~eligible, float("-inf"))
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(score.shape[-1], device=score.device) < count[:, None]
    return torch.zeros_like(eligible).scatter(-1, order, first) & eligible
