"""The one likelihood estimator: l_i = sum_k weight[k, i] log p(x_i | x with mask[k] masked).

Memory: only positions with a non-zero weight are unembedded, in chunks, with a float32 log-sum-exp that is recomputed
in the backward pass, so that no (N, L, V) tensor ever exists. Draws are scored in micro-batches of bounded token count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dllm_rl.diffusion.decoding import drawn_from
from dllm_rl.protocols.denoiser import Denoiser
from dllm_rl.types import LikelihoodEstimate, MaskSample, RolloutBatch, Sampling

CHUNK_ELEMENTS = 1 << 25  # logits held at once: 2^25 floats are 128 MiB in float32


def token_logp(
    unembed: Callable[[Tensor], Tensor],
    states: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    mask_id: int,
    chunk_elements: int = CHUNK_ELEMENTS,
    chunks: int = 1,
    sampling: Sampling | None = None,
) -> Tensor:
    """Log-probability of one token per row, without ever holding more than chunk_elements logits.

    The mask token is not a clean token: it has probability zero, here as in sampling.

    Args:
        unembed: hidden states (m, D) -> logits (m, V).
        states: (M, D) final hidden states.
        targets: (M,) int64.
        vocab_size: V.
        mask_id: id of the mask token.
        chunk_elements: bound on m * V; more rows are processed in chunks that are recomputed in the backward pass.
        chunks: at least so many chunks, empty ones too: ranks that share a sharded unembedding call it equally often.
        sampling: under the distribution that tokens are drawn from by it; None = the model's own.
    Returns:
        (M,) nats: float32, or float64 if the network computes in float64.
    """

    def of_chunk(rows: Tensor, ids: Tensor) -> Tensor:
        logits = unembed(rows)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits.index_fill(-1, torch.tensor([mask_id], device=logits.device), float("-inf"))
        logits = logits if sampling is None else drawn_from(logits, sampling)
        return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)

    number = max(chunks, chunk_count(len(targets), vocab_size, chunk_elements))
    if number == 1:
        return of_chunk(states, targets)  # the logits of one chunk fit: keep them rather than compute them twice
    pieces = [
        checkpoint(of_chunk, rows, ids, use_reentrant=False)
        for rows, ids in zip(states.tensor_split(number), targets.tensor_split(number), strict=True)
    ]
    return torch.cat(pieces)


def chunk_count(rows: int, vocab_size: int, chunk_elements: int = CHUNK_ELEMENTS) -> int:
    """Chunks in which token_logp unembeds so many rows."""
    return max(1, -(-rows // max(1, chunk_elements // vocab_size)))


@dataclass(frozen=True, slots=True)
class Work:
    """One micro-batch: which (draw, row) pairs are scored, on which noised copies.

    Pairs whose network input is the same share a copy: samples of one prompt have the same fully masked canvas, and the
    trajectories of a group start in the same states. A copy is forwarded once, whatever the number of its pairs.

    Attributes:
        draw: (m,) int64, of each pair.
        row: (m,) int64, of each pair.
        copy: (m,) int64 in 0..u-1; the copy each pair is scored on.
        example: (u,) int64; for each copy, one of its pairs.
        length: padded length of this micro-batch.
        chunks: unembed in at least so many chunks; see token_logp.
        idle: score nothing; only lets a rank keep step with others that have more to do.
    """

    draw: Tensor
    row: Tensor
    copy: Tensor
    example: Tensor
    length: int
    chunks: int = 1
    idle: bool = False


def plan(batch: RolloutBatch, masks: MaskSample, tokens_per_microbatch: int) -> list[Work]:
    """Split the scored (draw, row) pairs into micro-batches of at most tokens_per_microbatch padded tokens.

    Copies are sorted by length so that little padding is computed; draws in which a row scores nothing are dropped.
    A single copy longer than the budget forms a micro-batch of its own.
    """
    draw, row = (masks.weight != 0).any(-1).nonzero(as_tuple=True)
    lengths = batch.valid.sum(-1)[row]
    # Everything the network sees: the tokens that are left, the length and, for block-causal models, the clean copy.
    seen = batch.tokens[row].masked_fill(masks.mask[draw, row], -1)
    key = [lengths[:, None], seen]
    if batch.block_ids is not None:
        key += [batch.prompt_length[row][:, None], batch.tokens[row]]
    # unique() sorts, and the length is the first column: copies come out from short to long.
    copies, copy = torch.unique(torch.cat(key, dim=1), dim=0, return_inverse=True)
    sizes: list[int] = copies[:, 0].tolist()
    example = torch.empty(len(copies), dtype=torch.int64).scatter_(0, copy, torch.arange(len(copy)))
    work: list[Work] = []
    start = 0
    for end in range(1, len(sizes) + 1):
        if end == len(sizes) or sizes[end] * (end + 1 - start) > tokens_per_microbatch:
            chosen = ((copy >= start) & (copy < end)).nonzero().flatten()
            place = torch.empty(len(copy), dtype=torch.int64).scatter_(0, chosen, torch.arange(len(chosen)))
            work.append(
                Work(draw[chosen], row[chosen], copy[chosen] - start, place[example[start:end]], sizes[end - 1])
            )
            start = end
    return work


def score(
    denoiser: Denoiser, batch: RolloutBatch, masks: MaskSample, work: Work, sampling: Sampling | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the tokens that one micro-batch scores, with graph if gradients are enabled.

    Args:
        denoiser: the network.
        batch: rows.
        masks: draws, for the same rows.
        work: the micro-batch.
        sampling: see token_logp.
    Returns:
        (logp, pair, position): logp (M,) in nats, not weighted; pair (M,) indexes work.draw / work.row; position (M,)
        is the position in the row.
    """
    rows, pair, position = scored_states(denoiser, batch, masks, work)
    logp = token_logp(
        denoiser.unembed,
        rows,
        batch.tokens[work.row, : work.length].to(rows.device)[pair, position],
        vocab_size=denoiser.vocab_size,
        mask_id=denoiser.mask_id,
        chunks=work.chunks,
        sampling=sampling,
    )
    return logp, pair, position


def weights(masks: MaskSample, work: Work, pair: Tensor, position: Tensor) -> Tensor:
    """(M,) weights of what score gives for a micro-batch."""
    return masks.weight[work.draw, work.row, : work.length].to(pair.device)[pair, position]


def scored_states(
    denoiser: Denoiser, batch: RolloutBatch, masks: MaskSample, work: Work
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states (M, D), pair, position) of the positions that a micro-batch scores; see score."""
    device = denoiser.device
    cut = slice(0, work.length)
    draw, row = work.draw[work.example], work.row[work.example]
    states = denoiser.hidden_states(
        batch.tokens[row, cut].to(device),
        masks.mask[draw, row, cut].to(device),
        batch.valid[row, cut].to(device),
        None if batch.block_ids is None else batch.block_ids[row, cut].to(device),
    )
    weight = masks.weight[work.draw, work.row, cut].to(device)
    pair, position = (torch.zeros_like(weight) if work.idle else weight).nonzero(as_tuple=True)
    return states[work.copy.to(device)[pair], position], pair, position


def estimate(
    denoiser: Denoiser,
    batch: RolloutBatch,
    masks: MaskSample,
    *,
    tokens_per_microbatch: int = 1 << 14,
    draws: bool = False,
    sampling: Sampling | None = None,
) -> LikelihoodEstimate:
    """The estimate without gradient.

    Args:
        denoiser: the network.
        batch: rows.
        masks: draws, for the same rows.
        tokens_per_microbatch: bound on padded tokens per forward.
        draws: keep the log-probabilities of each draw.
        sampling: see token_logp.
    Returns:
        LikelihoodEstimate on the device of the batch.
    """
    forward = functools.partial(score, denoiser, batch, masks, sampling=sampling)
    with torch.no_grad():
        return summed(batch, masks, plan(batch, masks, tokens_per_microbatch), forward, draws=draws)


def summed(
    batch: RolloutBatch,
    masks: MaskSample,
    work: Sequence[Work],
    forward: Callable[[Work], tuple[Tensor, Tensor, Tensor]],
    *,
    draws: bool = False,
) -> LikelihoodEstimate:
    """The estimate from its micro-batches.

    Args:
        batch: rows.
        masks: draws, for the same rows.
        work: micro-batches.
        forward: gives what score gives for one of them.
        draws: keep the log-probabilities of each draw.
    """
    token: Tensor | None = None
    each: Tensor | None = None
    for part in work:
        logp, pair, position = forward(part)
        if token is None:
            token = logp.new_zeros(batch.tokens.shape)
            each = logp.new_zeros(masks.mask.shape) if draws else None
        values = weights(masks, part, pair, position) * logp
        number, row = part.draw.to(logp.device)[pair], part.row.to(logp.device)[pair]
        token = token.index_put((row, position), values, accumulate=True)
        each = None if each is None else each.index_put((number, row, position), logp)
    assert token is not None, "samplers refuse rows without completion"
    device = batch.tokens.device
    return LikelihoodEstimate(token_logp=token.to(device), draw_token_logp=None if each is None else each.to(device))


def entropy(denoiser: Denoiser, batch: RolloutBatch, masks: MaskSample, work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """Predictive entropy, without gradient, at the positions that a micro-batch scores.

    Args:
        denoiser: the network.
        batch: rows.
        masks: draws, for the same rows.
        work: the micro-batch.
    Returns:
        (values (M,) in nats, pair, position) as of score; of the distribution without the mask token.
    """
    with torch.no_grad():
        rows, pair, position = scored_states(denoiser, batch, masks, work)
        pieces = []
        for part in rows.tensor_split(max(work.chunks, chunk_count(len(rows), denoiser.vocab_size))):
            logits = denoiser.unembed(part).float()
            logits = logits.index_fill(-1, torch.tensor([denoiser.mask_id], device=logits.device), float("-inf"))
            pieces.append(torch.special.entr(logits.softmax(-1)).sum(-1))
    return torch.cat(pieces), pair, position
