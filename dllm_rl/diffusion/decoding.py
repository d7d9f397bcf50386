"""Decoding mathematics shared by every engine: proposing a token per masked position, choosing positions."""

from __future__ import annotations

from collections.abc import Sequence
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
        logp: (M,) float32 nats; of the token under the model's own distribution without the mask token: untempered,
            unfiltered, unguided.
        sampled_logp: (M,) float32 nats; of the token under the distribution that it was drawn from; 0 if greedy.
        confidence: (M,) float32 nats; of the token under the distribution that positions are ranked by
            (Sampling.confidence); -inf for tokens that are deferred.
        entropy: (M,) float32 nats of that distribution.
        margin: (M,) float32; its largest minus its second largest probability.
    """

    token: Tensor
    logp: Tensor
    sampled_logp: Tensor
    confidence: Tensor
    entropy: Tensor
    margin: Tensor


def propose(
    logits: Tensor, sampling: Sampling, uniform: Tensor, *, mask_id: int, unconditional: Tensor | None = None
) -> Proposals:
    """Propose a token for every row of logits: the most likely one, or one drawn by inverting the distribution.

    One uniform number decides a token, so that a draw depends on its own counter alone.

    Args:
        logits: (M, V).
        sampling: temperature (0 = greedy), top_k, top_p: applied to the tempered distribution, in that order unless
            top_p_first; confidence, cfg_scale, suppress_tokens, defer_tokens.
        uniform: (M,) float64 in (0, 1); unused when greedy.
        mask_id: the mask token; it has probability zero.
        unconditional: (M, V) logits behind a masked prompt; needed by cfg_scale.
    """
    own = _without(logits.float(), [mask_id])
    logp = own - own.logsumexp(-1, keepdim=True)
    logits, greedy = own, sampling.temperature == 0
    if unconditional is not None:
        base = unconditional.float()
        # The mask token again: infinity minus infinity is not a number.
        logits = _without(base + (sampling.cfg_scale + 1) * (own - base), [mask_id])
    logits = _without(logits, sampling.suppress_tokens)
    drawn = logits if greedy and sampling.confidence == "model" else drawn_from(logits, sampling)
    # argmax takes the first of equals, which topk does not promise; bfloat16 logits tie often.
    token = logits.argmax(-1) if greedy else _invert(drawn, uniform)
    ranked = _without(drawn if sampling.confidence == "sampled" else logits, sampling.defer_tokens)
    score = logp if ranked is own else ranked - ranked.logsumexp(-1, keepdim=True)
    probability = score.exp()
    entropy = -(probability * score.masked_fill(probability == 0, 0.0)).sum(-1)  # 0 log 0 = 0
    best_two = probability.topk(2, dim=-1).values
    own_logp = logp.gather(-1, token[:, None]).squeeze(-1)
    sampled_logp = torch.zeros_like(own_logp) if greedy else own_logp
    if not (greedy or sampling.plain):
        sampled_logp = drawn.gather(-1, token[:, None]).squeeze(-1) - drawn.logsumexp(-1)
    return Proposals(
        token=token,
        logp=own_logp,
        sampled_logp=sampled_logp,
        confidence=score.gather(-1, token[:, None]).squeeze(-1),
        entropy=entropy,
        margin=best_two[:, 0] - best_two[:, 1],
    )


def drawn_from(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (M, V) of the distribution that tokens are drawn from: tempered, then filtered; greedy: only filtered.

    Args:
        logits: (M, V) of the model, or guided, without the mask token.
        sampling: suppress_tokens, temperature, top_k, top_p.
    """
    return _filtered(_without(logits, sampling.suppress_tokens) / (sampling.temperature or 1), sampling)


def _without(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Logits with these tokens at -inf; the same tensor if there are none."""
    return logits.index_fill(-1, torch.tensor(tokens, device=logits.device), float("-inf")) if tokens else logits


def _filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits with everything outside top_k and top_p at -inf; of equal logits the lower ids are kept."""
    if sampling.top_p_first:
        return _top_k(_top_p(logits, sampling.top_p), sampling.top_k)
    return _top_p(_top_k(logits, sampling.top_k), sampling.top_p)


def _top_k(logits: Tensor, top_k: int | None) -> Tensor:
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(top_k, dim=-1).values[:, -1:]
    above, tied = logits > smallest, logits == smallest
    room = top_k - above.sum(-1, keepdim=True)
    return logits.masked_fill(~(above | (tied & (tied.cumsum(-1) <= room))), float("-inf"))


def _top_p(logits: Tensor, top_p: float | None) -> Tensor:
    if top_p is None or top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    outside = before >= top_p  # the token that crosses p is kept, so at least one always is
    return logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))


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


def draw_best(score: Tensor, eligible: Tensor, count: Tensor, noise: Tensor, *, temperature: float) -> Tensor:
    """Per row, `count` eligible positions: the best, or drawn without replacement in proportion to exp(score / T).

    Args:
        score: (N, W).
        eligible: (N, W) bool.
        count: (N,) int64.
        noise: (N, W) float64 uniforms in (0, 1).
        temperature: T; 0 = the best.
    Returns:
        (N, W) bool.
    Source: `alg_temp` of Dream's diffusion_generate; the draw by perturbed scores is Gumbel top-k, arXiv:1903.06059.
    """
    if temperature == 0:
        return take_best(score, eligible, count)
    return take_best(score.double() / temperature - (-noise.log()).log(), eligible, count)
