"""Mask samplers: which noised copies of a completion are scored, and with what weights.

Every likelihood in this code base is  l_i = sum_k weight[k, i] log p(x_i | x with mask[k] masked).  Two laws hold for
every sampler and are tested by exact enumeration:

    no peeking           weight[k, i] != 0  implies  mask[k, i]
    partition of unity   E sum_k weight[k, i] = 1 on the completion, 0 elsewhere

Samplers know only the completion; positions that must be masked as well (a canvas' tail) are added with
``MaskSample.also_masking``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dllm_rl.types import GIVEN, MaskSample


def fully_masked(
    completion: Tensor,
    *,
    prompt: Tensor | None = None,
    prompt_mask_rate: float = 0.0,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> MaskSample:
    """Hide the whole completion, and each prompt token with a small probability: the mean-field one-step likelihood.

    Args:
        completion: (N, L) bool; every row needs at least one True.
        prompt: (N, L) bool; tokens that may be masked as augmentation (they are never scored).
        prompt_mask_rate: probability in [0, 1) for each of them.
        draws: independent prompt maskings K; each completion token is scored in all, weight 1/K.
        generator: CPU generator; needed if prompt_mask_rate > 0.
    Returns:
        MaskSample with K = draws.
    Source: Zhao et al. 2025 (d1, diffu-GRPO), arXiv:2504.12216.
    """
    _check(completion, draws)
    if not 0 <= prompt_mask_rate < 1:
        raise ValueError(f"prompt_mask_rate = {prompt_mask_rate}: must be in [0, 1)")
    mask = completion.expand(draws, *completion.shape)
    if prompt is not None and prompt_mask_rate > 0:
        mask = mask | (prompt & (_rand(mask, generator) < prompt_mask_rate))
    return MaskSample(mask=mask.clone(), weight=completion.expand_as(mask).float() / draws)


def no_draws(completion: Tensor) -> MaskSample:
    """K = 0: for algorithms that score no token (they train an unmasking policy)."""
    empty = completion[None][:0]
    return MaskSample(mask=empty, weight=empty.float())


def bernoulli(
    completion: Tensor, *, draws: int = 1, t_min: float = 1e-3, t_max: float = 1.0, generator: torch.Generator
) -> MaskSample:
    """Hide each token with probability t ~ U[t_min, t_max]; weight 1/t where masked: the classic ELBO integrand.

    Args:
        completion: (N, L) bool.
        draws: K; rates are stratified over the draws of a row (one per K-quantile), weight 1/(K t).
        t_min: smallest masking rate, > 0 since the weight is 1/t.
        t_max: largest masking rate, <= 1.
        generator: CPU generator.
    Returns:
        MaskSample with K = draws; a draw may hide nothing.
    Source: Nie et al. 2025 (LLaDA), arXiv:2502.09992, Eq. 3. No difference from the released code but stratification.
    """
    _check(completion, draws)
    _check_rates(t_min, t_max)
    t = t_min + (t_max - t_min) * _stratified(completion, draws, generator)  # (K, N, 1)
    mask = completion & (_rand(completion.expand(draws, *completion.shape), generator) < t)
    return MaskSample(mask=mask, weight=(mask / t / draws).float())


def uniform_count(
    completion: Tensor, *, draws: int = 1, block_ids: Tensor | None = None, generator: torch.Generator
) -> MaskSample:
    """Hide n ~ U{1..C} uniformly chosen of the C completion tokens; weight C/n: the any-order ELBO, lower variance.

    Counts are stratified over the draws of a row: n_k = 1 + floor(C (k + u)/K mod C) with one u, so that each n_k alone
    is uniform and together they cover 1..C evenly. With blocks every block of a row has counts of its own: a draw of a
    block-causal model, whose blocks see clean ones before them, then sums the ELBOs of all blocks.

    Args:
        completion: (N, L) bool.
        draws: K; weight C/(K n).
        block_ids: (N, L) int64 block numbers for block-causal models, None for full attention: one block.
        generator: CPU generator.
    Returns:
        MaskSample with K = draws; every draw hides at least one token of every row, and of every block.
    Source: Ou et al. 2025, arXiv:2406.03736 (any-order ELBO); stratification over the samples of one sequence:
        the LLaDA 1.5 estimator (arXiv:2505.19223) with n_t = K, n_m = 1; all blocks in one draw: Arriola et al. 2025
        (block diffusion), arXiv:2503.09573.
    """
    _check(completion, draws)
    scope = torch.zeros_like(completion, dtype=torch.long)
    if block_ids is not None:
        scope = (block_ids - block_ids[completion].min()).clamp(0).masked_fill(~completion, 0)
    length = torch.zeros(len(scope), int(scope.max()) + 1, dtype=torch.long, device=scope.device)
    length.scatter_add_(1, scope, completion.long())  # (N, B) completion tokens of each block
    # u rounds up to 1.0 with probability 2^-53; a block without tokens hides none of them.
    count = (1 + (_stratified(completion, draws, generator, length.shape[1]) * length).floor().long()).minimum(length)
    rank = _random_rank(completion, draws, generator, scope)  # blocks one after the other
    here = scope.expand(draws, *scope.shape)
    count, before = count.gather(2, here), (length.cumsum(1) - length).gather(1, scope)
    mask = completion & (rank - before < count)
    return MaskSample(mask=mask, weight=(mask * (length.gather(1, scope) / count.clamp(min=1)) / draws).float())


def blockwise_count(
    completion: Tensor, block_ids: Tensor, *, draws: int = 1, together: bool = False, generator: torch.Generator
) -> MaskSample:
    """Hide n ~ U{1..c} uniformly chosen of the c completion tokens of a random block, and all of every later block.

    With B blocks, each drawn equally often, a token of block j (from 0) is hidden if one of j + 1 blocks is drawn.
    All of these weigh the same:  B/(j+1) c/n  for the n tokens of the drawn block,  B/(j+1)  for those of later ones.
    Blocks and shares n/c are stratified over the draws of a row: up to B draws choose different blocks.

    Args:
        completion: (N, L) bool.
        block_ids: (N, L) int64 block numbers, rising from left to right.
        draws: K; weights are divided by it.
        together: hide a part of every block in every draw, each with its own n and weight c/n: for block-causal models,
            where blocks do not see each other's noise.
        generator: CPU generator.
    Returns:
        MaskSample with K = draws.
    Source: Wang et al. 2025 (SPG), arXiv:2510.09541, Section 3.3. Differs from the released code: blocks are uniform
        whatever their number, and weights are per token instead of C/m for the m hidden tokens of a draw.
    """
    _check(completion, draws)
    ids = block_ids.masked_fill(~completion, int(block_ids.max()))
    block = (block_ids - ids.min(-1, keepdim=True).values).masked_fill(~completion, 0)  # (N, L), 0.. per row
    num_blocks = block.max(-1, keepdim=True).values + 1  # (N, 1)
    size = torch.zeros(len(completion), int(num_blocks.max()), dtype=torch.int64, device=completion.device)
    size = size.scatter_add(1, block, completion.long())  # (N, B)
    cells = torch.ones_like(size, dtype=torch.bool).flatten()[:, None]  # one stratified share for each row and block
    share = _stratified(cells, draws, generator).view(draws, *size.shape)
    count = (1 + (share * size).floor().long()).clamp(max=size)  # (K, N, B), 0 in blocks that a row does not have
    every = completion.expand(draws, *completion.shape)
    key = (block + _rand(every, generator)).masked_fill(~completion, size.shape[1])  # block by block, each shuffled
    rank = key.argsort(-1).argsort(-1) - (size.cumsum(-1) - size).gather(1, block)  # within the block
    own = count.gather(2, block.expand(draws, -1, -1))  # (K, N, L) n of the token's block
    noised = completion & (rank < own)
    weight = noised * size.gather(1, block) / own.clamp(min=1) / draws
    if together:
        return MaskSample(mask=noised, weight=weight.float())
    chosen = (_stratified(completion, draws, generator) * num_blocks).floor().long().clamp(max=num_blocks - 1)
    here, later = block == chosen, completion & (block > chosen)  # (K, N, L)
    weight = torch.where(later, 1 / draws, here * weight) * num_blocks / (block + 1)
    return MaskSample(mask=torch.where(here, noised, later), weight=weight.float())


def complementary_pair(
    completion: Tensor,
    *,
    t_min: float = 0.2,
    t_max: float = 0.8,
    pairs: int = 1,
    full_view: bool = False,
    generator: torch.Generator,
) -> MaskSample:
    """Hide M ~ Bernoulli(t) in one copy and its complement in the other: every token is scored exactly once a pair.

        l_i = 1/2 ( 1[i in M]/t + 1[i not in M]/(1 - t) ) log p(x_i | x with its own half masked),  t ~ U[t_min, t_max]

    With the full view, each of the 2 pairs + 1 copies weighs the same: l_i = (phi_i + 2 sum_pairs l_i) / (2 pairs + 1).

    Args:
        completion: (N, L) bool.
        t_min: smallest masking rate, > 0.
        t_max: largest masking rate, < 1.
        pairs: number of independent pairs; each weighs 1/pairs (rates are stratified over them).
        full_view: add a copy with the whole completion masked.
        generator: CPU generator.
    Returns:
        MaskSample with K = 2 * pairs (+ 1, the last); draws 2j and 2j + 1 are complements.
    Source: Gong et al. 2025 (DiffuCoder, coupled-GRPO), arXiv:2506.20639. The released code adds the full view to one
        pair and divides by 2, so that its weights average 3/2, not 1.
    """
    _check(completion, pairs)
    _check_rates(t_min, t_max)
    if t_max >= 1:
        raise ValueError(f"t_max = {t_max}: must be < 1, the complement is weighted by 1/(1 - t)")
    t = t_min + (t_max - t_min) * _stratified(completion, pairs, generator)  # (P, N, 1)
    first = completion & (_rand(completion.expand(pairs, *completion.shape), generator) < t)
    second = completion & ~first
    mask = torch.stack([first, second], dim=1).flatten(0, 1)
    weight = torch.stack([first / t, second / (1 - t)], dim=1).flatten(0, 1)
    if full_view:
        mask = torch.cat([mask, completion[None]])
        weight = torch.cat([weight, completion[None].to(weight.dtype)])
    return MaskSample(mask=mask, weight=(weight / len(mask)).float())


def complementary_count(completion: Tensor, *, pairs: int = 1, generator: torch.Generator) -> MaskSample:
    """Hide n ~ U{0..C} uniformly chosen tokens in one copy, the others in its twin: two anti-correlated ELBO samples.

        l_i = 1/2 ( 1[i in M] (C+1)/n + 1[i not in M] (C+1)/(C-n) ) log p(x_i | x with its own half masked)

    Each half alone is unbiased for the any-order ELBO: n = 0 and n = C are drawn, and leave one copy empty.

    Args:
        completion: (N, L) bool.
        pairs: number of pairs; counts are stratified over them, each weighs 1/pairs.
        generator: CPU generator.
    Returns:
        MaskSample with K = 2 * pairs; draws 2j and 2j + 1 are complements.
    Source: Ou et al. 2025 (ESPO), arXiv:2512.03759. Differs from the released code: counts are stratified over the
        draws of a row, not over the rows of a batch.
    """
    _check(completion, pairs)
    length = completion.sum(-1, keepdim=True)  # (N, 1)
    count = (_stratified(completion, pairs, generator) * (length + 1)).floor().long().clamp(max=length)  # (P, N, 1)
    first = completion & (_random_rank(completion, pairs, generator) < count)
    second = completion & ~first
    weight = torch.stack(
        [first * (length + 1) / count.clamp(min=1), second * (length + 1) / (length - count).clamp(min=1)], dim=1
    )
    mask = torch.stack([first, second], dim=1).flatten(0, 1)
    return MaskSample(mask=mask, weight=(weight.flatten(0, 1) / (2 * pairs)).float())


def quadrature(
    completion: Tensor, *, nodes: int, draws: int = 1, floor: bool = False, generator: torch.Generator
) -> MaskSample:
    """Hide round(t_q C) completion tokens at each Gauss-Legendre node t_q: t is integrated, only the mask is random.

        int_0^1 (1/t) E[ sum_{i in M_t} log p(x_i | x_M) ] dt  ~=  sum_q w_q (C/n_q) sum_{i in M_q} log p(x_i | x_{M_q})

    Args:
        completion: (N, L) bool.
        nodes: number of Gauss-Legendre nodes on [0, 1], 1..5.
        draws: masks per node; each weighs 1/draws.
        floor: hide floor(t_q C) tokens and weigh them by 1/t_q, as the released code does: weights then sum to less
            than 1, by floor(t_q C)/(t_q C).
        generator: CPU generator.
    Returns:
        MaskSample with K = nodes * draws, node-major.
    Raises:
        ValueError: nodes outside 1..5, or a row without completion tokens.
    Source: Rojas et al. 2025 (GDPO), arXiv:2510.08554. Differs from the released code as said under ``floor``.
    """
    _check(completion, draws)
    if not 1 <= nodes <= 5:
        raise ValueError(f"nodes = {nodes}: must be 1..5")
    x, w = np.polynomial.legendre.leggauss(nodes)
    t = torch.from_numpy((x + 1) / 2).repeat_interleave(draws).view(-1, 1, 1)  # (K, 1, 1)
    node_weight = torch.from_numpy(w / 2).repeat_interleave(draws).view(-1, 1, 1) / draws
    length = completion.sum(-1, keepdim=True)
    t = t.to(completion.device)
    count = ((t * length).floor() if floor else (t * length).round()).long().clamp(min=1)  # (K, N, 1)
    mask = completion & (_random_rank(completion, len(t), generator) < count)
    weight = mask * (1 / t if floor else length / count) * node_weight.to(completion.device)
    return MaskSample(mask=mask, weight=weight.float())


def left_to_right(canvas: Tensor, completion: Tensor, *, block_ids: Tensor | None = None) -> MaskSample:
    """Hide token i and everything after it: the exact conditionals of left-to-right decoding, one draw per token.

    Block-causal models score a token of every block per draw (K = block size): blocks do not see each other's noise.

    Args:
        canvas: (N, L) bool; positions that decoding had to fill (given tokens stay visible).
        completion: (N, L) bool, the scored positions, a subset of canvas.
        block_ids: (N, L) int64 block numbers for block-causal models, None for full attention.
    Source: Ni et al. 2026 (JustGRPO), arXiv:2601.15165.
    """
    position = torch.arange(canvas.shape[1], device=canvas.device).expand(canvas.shape)
    return along_trajectory(position.masked_fill(~canvas, GIVEN), completion, block_ids=block_ids)


def along_trajectory(
    unmask_step: Tensor, completion: Tensor, *, block_ids: Tensor | None = None, merge: int = 1
) -> MaskSample:
    """Replay a rollout: token i is scored in the state right before the forward that committed it.

    Full attention: draw k hides what was still masked at the k-th distinct step. Block-causal models: blocks do not see
    each other's noise, so draw k replays the k-th distinct step of *every* block at once (K <= block size).

    Args:
        unmask_step: (N, L) int64; negative where given, larger than every step where never decoded.
        completion: (N, L) bool, the scored positions.
        block_ids: (N, L) int64 block numbers for block-causal models, None for full attention.
        merge: consecutive steps that share a draw (the paper's shrink s): 1/merge of the forwards, but a token is then
            scored in the state before the earliest of them, with more masked than the sampler saw.
    Returns:
        MaskSample with K = the largest number of distinct (merged) steps (in any block) over the batch; the weight is
        one at the committing step, so every completion token is scored exactly once and sum_k weight = 1 without noise.
    Source: Wang et al. 2025 (TraceRL), arXiv:2509.06949.
    """
    _check(completion, 1)
    if merge < 1:
        raise ValueError(f"merge = {merge}: must be at least 1")
    if bool((completion & (unmask_step < 0)).any()):
        raise ValueError(
            "along_trajectory: a completion token has no unmask step; the batch does not come from rollouts"
        )
    # Only scored steps make a draw. Hidden but unscored positions (the tail after EOS) join the last one before them.
    scope = torch.zeros_like(unmask_step) if block_ids is None else block_ids
    rank = _dense_rank(unmask_step, completion, scope).div(merge, rounding_mode="floor")
    num_draws = int(rank[completion].max()) + 1
    step = torch.arange(num_draws, device=completion.device)[:, None, None]
    generated = unmask_step >= 0
    mask = generated & (rank >= step)
    return MaskSample(mask=mask, weight=(completion & (rank == step)).float())


def merged_steps(unmask_step: Tensor, completion: Tensor, *, block_ids: Tensor | None = None, merge: int = 1) -> Tensor:
    """(N, L) int64 number, from 0 in the order of time, of the merged step that committed a completion token.

    Args as in along_trajectory, whose draws these are: tokens of one number are scored in one state, except that draws
    of block-causal models hold a step of every block.
    """
    scope = torch.zeros_like(unmask_step) if block_ids is None else block_ids - block_ids.min()
    rank = _dense_rank(unmask_step, completion, scope).div(merge, rounding_mode="floor")
    width = int(rank[completion].max()) + 1
    return _dense_rank(scope * width + rank, completion, torch.zeros_like(scope))  # blocks follow one another in time


def along_segments(
    unmask_step: Tensor,
    completion: Tensor,
    *,
    num_forwards: Tensor,
    segments: int,
    block_ids: Tensor | None = None,
) -> MaskSample:
    """Replay a rollout in few states: its T forwards are cut into N segments, and a token is scored before its segment.

    Forward s belongs to segment n if floor(n T/N) <= s < floor((n + 1) T/N); its tokens are scored in the state right
    before the first forward of the segment. N = 1 hides the whole canvas, N >= T is along_trajectory. Block-causal
    models score a segment's tokens block by block: earlier blocks are in sight, as they were when it was decoded.

    Args:
        unmask_step: (N, L) int64; negative where given, num_forwards where never decoded.
        completion: (N, L) bool, the scored positions.
        num_forwards: (N,) int64 T of each row.
        segments: N, the most states per row; per row and block for block-causal models.
        block_ids: (N, L) int64 block numbers for block-causal models, None for full attention.
    Returns:
        MaskSample whose K is the largest number of segments that scored something; every token is scored exactly once.
    Source: Wang et al. 2025 (d2, StepMerge), arXiv:2509.21474; boundaries as in the released code.
    """
    if segments < 1:
        raise ValueError(f"segments = {segments}: must be at least 1")
    given = unmask_step < 0
    segment = (segments * (unmask_step + 1) - 1).div(num_forwards[:, None].clamp(min=1), rounding_mode="floor")
    return along_trajectory(torch.where(given, unmask_step, segment), completion, block_ids=block_ids)


def at_rate(completion: Tensor, rate: Tensor, *, generator: torch.Generator) -> MaskSample:
    """Hide round(t C) uniformly chosen completion tokens of a row, at least one, for a masking rate t that is given.

    The rates make the estimator: with t from a grid or U[0, 1] the weighted sum is an ELBO integrand.

    Args:
        completion: (N, L) bool; every row needs at least one True.
        rate: (N,) t in [0, 1] of each row.
        generator: CPU generator.
    Returns:
        MaskSample with K = 1; weight C/n for the n tokens hidden of C.
    Raises:
        ValueError: a rate outside [0, 1].
    """
    _check(completion, 1)
    if bool(((rate < 0) | (rate > 1)).any()):
        raise ValueError(f"rate = {rate.tolist()}: must be in [0, 1]")
    length = completion.sum(-1, keepdim=True)  # (N, 1)
    count = (rate[:, None] * length).round().long().clamp(min=1)
    mask = completion & (_random_rank(completion, 1, generator) < count)
    return MaskSample(mask=mask, weight=(mask * (length / count)).float())


def _dense_rank(step: Tensor, scored: Tensor, scope: Tensor) -> Tensor:
    """(N, L) number, minus one, of distinct scored steps in the position's row and scope that are not after its own."""
    num_rows, length = step.shape
    cap = int(step[scored].max()) + 1  # every later step counts as this one
    scope = scope - scope.min()
    row = torch.arange(num_rows, device=step.device)[:, None]
    base = (row * (scope.max() + 1) + scope) * (cap + 1)  # (row, scope, step) as one sortable number
    distinct = torch.unique((base + step)[scored])
    not_after = torch.searchsorted(distinct, (base + step.clamp(0, cap)).flatten(), right=True)
    return (not_after - torch.searchsorted(distinct, base.flatten()) - 1).view(num_rows, length)


def _check(completion: Tensor, draws: int) -> None:
    if completion.dim() != 2 or completion.dtype != torch.bool:
        raise ValueError(f"completion must be (N, L) bool, got {tuple(completion.shape)} {completion.dtype}")
    if draws < 1:
        raise ValueError(f"draws = {draws}: must be at least 1")
    empty = ~completion.any(-1)
    if bool(empty.any()):
        raise ValueError(f"row {int(empty.nonzero()[0])} has no completion token to score")


def _check_rates(t_min: float, t_max: float) -> None:
    if not 0 < t_min <= t_max <= 1:
        raise ValueError(f"t_min = {t_min}, t_max = {t_max}: need 0 < t_min <= t_max <= 1")


def _rand(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Float64 uniforms drawn on the CPU (the same on every device) and moved to where the batch lives."""
    return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like.device)


def _stratified(completion: Tensor, draws: int, generator: torch.Generator, blocks: int = 1) -> Tensor:
    """(K, N, B) float64; each uniform on [0, 1), one in every K-quantile of a row's block, in random rotation."""
    u = torch.rand(1, len(completion), blocks, generator=generator, dtype=torch.float64)
    k = torch.arange(draws, dtype=torch.float64).view(-1, 1, 1)
    return ((u + k / draws) % 1.0).to(completion.device)


def _random_rank(completion: Tensor, draws: int, generator: torch.Generator, scope: Tensor | None = None) -> Tensor:
    """(K, N, L) rank of each completion token in an independent random order per draw; others rank last.

    With a scope (N, L) int64, tokens of a lower one come first.
    """
    u = _rand(completion.expand(draws, *completion.shape), generator)
    u = (u if scope is None else u + scope).masked_fill(~completion, float("inf"))
    return u.argsort(-1).argsort(-1)
