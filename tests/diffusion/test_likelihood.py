"""The likelihood estimator against exact enumeration and against a version that builds (N, L, V)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dllm_rl.diffusion import likelihood, masking
from dllm_rl.diffusion.layout import block_index
from dllm_rl.seeding import generator_for
from dllm_rl.types import MaskSample, RolloutBatch

ATOL_F64 = 1e-10
FAMILIES = ("tiny", "llada", "dream", "sdar")


def rollouts(denoiser, lengths=((2, 4), (3, 3), (1, 5), (4, 1)), *, seed=0, extra_padding=0) -> RolloutBatch:
    """Ragged random rows: (prompt length, completion length) each."""
    n, width = len(lengths), max(p + c for p, c in lengths) + extra_padding
    tokens = torch.full((n, width), denoiser.pad_id)
    valid, completion = (torch.zeros(n, width, dtype=torch.bool) for _ in range(2))
    step = torch.full((n, width), -1)
    for row, (p, c) in enumerate(lengths):
        tokens[row, : p + c] = torch.randint(
            3, denoiser.vocab_size, (p + c,), generator=generator_for(seed, "row", p, c)
        )
        valid[row, : p + c] = True
        completion[row, p : p + c] = True
        step[row, p : p + c] = torch.randperm(c, generator=generator_for(seed, "steps", p, c)) // 2
    prompt_length = torch.tensor([p for p, _ in lengths])
    blocks = None
    if denoiser.block_size is not None:
        blocks = block_index(prompt_length, width, denoiser.block_size, denoiser.block_origin)
    zeros = torch.zeros(n, dtype=torch.int64)
    return RolloutBatch(
        tokens=tokens,
        valid=valid,
        completion=completion,
        hint=torch.zeros_like(valid),
        tail=torch.zeros_like(valid),
        unmask_step=step,
        behaviour_logp=torch.zeros(n, width),
        prompt_length=prompt_length,
        group=zeros,
        num_forwards=zeros + 1,
        weights_step=torch.zeros_like(step),
        block_ids=blocks,
        exact=True,
    ).check()


def naive(denoiser, batch, masks):
    """(N, L) the long way: full logits, full log-softmax, in float64."""
    total = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    for mask, weight in zip(masks.mask, masks.weight, strict=True):
        hidden = denoiser.hidden_states(batch.tokens, mask, batch.valid, batch.block_ids)
        logits = denoiser.unembed(hidden.flatten(0, 1)).view(*batch.tokens.shape, -1).double()
        logits[..., denoiser.mask_id] = float("-inf")
        logp = logits.log_softmax(-1).gather(-1, batch.tokens[..., None]).squeeze(-1)
        total = total + torch.where(weight != 0, weight * logp, 0.0)
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_version_with_gradients(tiny_denoiser, family):
    denoiser = tiny_denoiser(family, dtype=torch.float64)
    batch = rollouts(denoiser)
    masks = masking.uniform_count(batch.completion, draws=3, generator=generator_for(0))
    parameters = list(denoiser.module.parameters())
    coefficient = torch.randn(batch.tokens.shape, generator=generator_for(1), dtype=torch.float64)
    want = naive(denoiser, batch, masks)
    want_gradient = torch.autograd.grad((coefficient * want).sum(), parameters)
    got = likelihood.estimate(denoiser, batch, masks, draws=True)
    torch.testing.assert_close(got.token_logp, want, atol=ATOL_F64, rtol=0)
    torch.testing.assert_close((masks.weight * got.draw_token_logp).sum(0), want, atol=ATOL_F64, rtol=0)
    loss = torch.zeros((), dtype=torch.float64)
    for work in likelihood.plan(batch, masks, 20):
        logp, pair, position = likelihood.score(denoiser, batch, masks, work)
        values = likelihood.weights(masks, work, pair, position) * logp
        loss = loss + (values * coefficient[work.row[pair], position]).sum()
    for mine, theirs in zip(torch.autograd.grad(loss, parameters), want_gradient, strict=True):
        torch.testing.assert_close(mine, theirs, atol=ATOL_F64, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_does_not_depend_on_microbatch_padding_or_row_order(tiny_denoiser, family):
    denoiser = tiny_denoiser(family, dtype=torch.float64)
    batch = rollouts(denoiser)
    masks = masking.complementary_pair(batch.completion, pairs=2, generator=generator_for(0))
    want = likelihood.estimate(denoiser, batch, masks).token_logp
    for budget in (1, 9, 40):
        got = likelihood.estimate(denoiser, batch, masks, tokens_per_microbatch=budget).token_logp
        torch.testing.assert_close(got, want, atol=ATOL_F64, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    got = likelihood.estimate(denoiser, batch.select(order), masks.select(order)).token_logp
    torch.testing.assert_close(got, want[order], atol=ATOL_F64, rtol=0)
    wide = rollouts(denoiser, extra_padding=5)
    pad = torch.nn.functional.pad
    wide_masks = MaskSample(mask=pad(masks.mask, (0, 5)), weight=pad(masks.weight, (0, 5)))
    got = likelihood.estimate(denoiser, wide, wide_masks).token_logp
    torch.testing.assert_close(got[:, :-5], want, atol=ATOL_F64, rtol=0)
    assert not got[:, -5:].any()


def any_order_bound(denoiser, batch):
    """Mean over all orders of the exact chain rule, for one row of 2 prompt and 4 completion tokens."""
    total, orders = 0.0, list(itertools.permutations(range(2, 6)))
    for order in orders:
        replay = torch.full((1, 6), -1)
        replay[0, list(order)] = torch.arange(4)
        one = masking.along_trajectory(replay, batch.completion)
        total += likelihood.estimate(denoiser, batch, one).sequence_logp.item()
    return total / len(orders)


def test_count_estimator_is_the_any_order_bound_exactly(tiny_denoiser):
    """Enumerating every mask with its probability gives the mean over all 4! orders of the exact chain rule."""
    denoiser = tiny_denoiser(dtype=torch.float64)
    batch = rollouts(denoiser, ((2, 4),))
    subsets = [s for n in range(1, 5) for s in itertools.combinations(range(2, 6), n)]
    mask = torch.zeros(len(subsets), 1, 6, dtype=torch.bool)
    weight = torch.zeros(len(subsets), 1, 6, dtype=torch.float64)
    for k, subset in enumerate(subsets):
        n = len(subset)
        mask[k, 0, list(subset)] = True
        weight[k, 0, list(subset)] = 1 / 4 / math.comb(4, n) * 4 / n  # P(n) P(subset | n) times the weight C/n
    got = likelihood.estimate(denoiser, batch, MaskSample(mask=mask, weight=weight)).sequence_logp.item()
    assert got == pytest.approx(any_order_bound(denoiser, batch), abs=ATOL_F64)


def test_complementary_counts_are_the_any_order_bound_exactly(tiny_denoiser):
    """Both halves of the pair, every mask with its probability: 1/2 (C+1)/n each, counts 0..C."""
    denoiser = tiny_denoiser(dtype=torch.float64)
    batch = rollouts(denoiser, ((2, 4),))
    everything = range(2, 6)
    subsets = [s for n in range(5) for s in itertools.combinations(everything, n)]
    mask = torch.zeros(2 * len(subsets), 1, 6, dtype=torch.bool)
    weight = torch.zeros(2 * len(subsets), 1, 6, dtype=torch.float64)
    for k, subset in enumerate(subsets):
        probability = 1 / 5 / math.comb(4, len(subset))
        for half, members in enumerate((subset, tuple(set(everything) - set(subset)))):
            mask[2 * k + half, 0, list(members)] = True
            weight[2 * k + half, 0, list(members)] = probability * 5 / max(1, len(members)) / 2
    got = likelihood.estimate(denoiser, batch, MaskSample(mask=mask, weight=weight)).sequence_logp.item()
    assert got == pytest.approx(any_order_bound(denoiser, batch), abs=ATOL_F64)


@pytest.mark.parametrize("family", ["tiny", "dream", "sdar"])
@pytest.mark.parametrize("kind", ["left_to_right", "trajectory"])
def test_exact_likelihoods_are_distributions(tiny_denoiser, family, kind):
    """Over all completions of 3 tokens, left-to-right and fixed-order likelihoods sum to one."""
    denoiser = tiny_denoiser(family, dtype=torch.float64, characters="01")
    clean = [token for token in range(denoiser.vocab_size) if token != denoiser.mask_id]
    every = torch.tensor(list(itertools.product(clean, repeat=3)))
    one = rollouts(denoiser, ((2, 3),))
    batch = one.select(torch.zeros(len(every), dtype=torch.int64))
    batch.tokens[:, 2:] = every
    if kind == "left_to_right":
        masks = masking.left_to_right(batch.completion, batch.completion, block_ids=batch.block_ids)
    else:
        step = torch.tensor([[-1, -1, 2, 0, 1]]).expand(len(every), -1)
        masks = masking.along_trajectory(step, batch.completion, block_ids=batch.block_ids)
    logp = likelihood.estimate(denoiser, batch, masks).sequence_logp
    assert logp.exp().sum().item() == pytest.approx(1.0, abs=ATOL_F64)


@pytest.mark.parametrize("draws", [1, 4])
def test_sampled_count_estimates_scatter_around_the_exact_bound(tiny_denoiser, draws):
    denoiser = tiny_denoiser()
    one = rollouts(denoiser, ((2, 4),))
    orders = list(itertools.permutations(range(2, 6)))
    replay = torch.full((len(orders), 6), -1)
    for row, order in enumerate(orders):
        replay[row, list(order)] = torch.arange(4)
    many = one.select(torch.zeros(len(orders), dtype=torch.int64))
    exact = likelihood.estimate(denoiser, many, masking.along_trajectory(replay, many.completion)).sequence_logp.mean()
    rows = one.select(torch.zeros(4000, dtype=torch.int64))
    sample = masking.uniform_count(rows.completion, draws=draws, generator=generator_for(0, draws))
    estimates = likelihood.estimate(denoiser, rows, sample).sequence_logp
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / math.sqrt(4000)


@pytest.mark.parametrize("draws", [1, 3])
def test_counts_of_blocks_scatter_around_the_bound_of_block_by_block_decoding(tiny_denoiser, draws):
    """The mean over all orders within blocks of 3 and 2 tokens; counts over the row have it too, and scatter more."""
    denoiser = tiny_denoiser("sdar", block_size=3, block_origin="response")
    one = rollouts(denoiser, ((2, 5),))
    inside = itertools.product(itertools.permutations(range(2, 5)), itertools.permutations(range(5, 7)))
    replay = torch.full((12, 7), -1)
    for row, (first, second) in enumerate(inside):
        replay[row, [*first, *second]] = torch.arange(5)
    many = one.select(torch.zeros(12, dtype=torch.int64))
    step = masking.along_trajectory(replay, many.completion, block_ids=many.block_ids)
    exact = likelihood.estimate(denoiser, many, step).sequence_logp.mean()
    rows = one.select(torch.zeros(4000, dtype=torch.int64))
    sample = masking.uniform_count(
        rows.completion, draws=draws, block_ids=rows.block_ids, generator=generator_for(0, draws)
    )
    estimates = likelihood.estimate(denoiser, rows, sample).sequence_logp
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / math.sqrt(4000)
    whole = masking.uniform_count(rows.completion, draws=draws, generator=generator_for(0, draws))
    scatter = likelihood.estimate(denoiser, rows, whole).sequence_logp
    assert abs(scatter.mean() - exact) < 4 * scatter.std() / math.sqrt(4000)
    assert estimates.std() < 0.9 * scatter.std()


def test_chunked_unembedding_recomputes_to_the_same_values_and_gradients():
    generator = generator_for(0)
    hidden = torch.randn(37, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(50, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(1, 50, (37,), generator=generator)

    def run(elements):
        logp = likelihood.token_logp(
            lambda rows: rows @ matrix.T, hidden, targets, vocab_size=50, mask_id=0, chunk_elements=elements
        )
        return logp, torch.autograd.grad((logp * torch.arange(37)).sum(), [hidden, matrix])

    whole, whole_gradient = run(50 * 37)
    pieces, pieces_gradient = run(50 * 5)
    torch.testing.assert_close(pieces, whole, atol=1e-12, rtol=0)
    for a, b in zip(pieces_gradient, whole_gradient, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_mask_token_has_probability_zero():
    logits = torch.tensor([[5.0, 1.0, 2.0]])
    logp = likelihood.token_logp(lambda rows: rows, logits, torch.tensor([1]), vocab_size=3, mask_id=0)
    assert logp.item() == pytest.approx(1.0 - math.log(math.exp(1) + math.exp(2)), abs=1e-6)


def test_half_precision_logits_are_normalised_in_float32():
    logits = torch.randn(4, 1000, generator=generator_for(0)).bfloat16()
    targets = torch.tensor([1, 2, 3, 4])
    logp = likelihood.token_logp(lambda rows: rows, logits, targets, vocab_size=1000, mask_id=0)
    exact = logits.double()
    exact[:, 0] = float("-inf")
    want = exact.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1).float()
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, want, atol=1e-5, rtol=0)


def test_microbatches_hold_the_budget_and_every_scored_pair_once(tiny_denoiser):
    batch = rollouts(tiny_denoiser())
    masks = masking.along_trajectory(batch.unmask_step, batch.completion)
    works = likelihood.plan(batch, masks, 12)
    assert all(len(w.row) * w.length <= 12 for w in works)
    pairs = [(int(k), int(n)) for w in works for k, n in zip(w.draw, w.row, strict=True)]
    scored = {(int(k), int(n)) for k, n in (masks.weight != 0).any(-1).nonzero()}
    assert len(pairs) == len(set(pairs)) and set(pairs) == scored


def test_equal_noised_copies_are_forwarded_once(tiny_denoiser):
    """Samples of one prompt share the fully masked canvas; what is visible, or a block model's clean copy, does not."""
    for family, copies in (("tiny", 2), ("sdar", 8)):
        denoiser = tiny_denoiser(family, dtype=torch.float64)
        two = rollouts(denoiser, ((2, 4), (3, 3)))
        batch = two.select(torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]))
        batch.tokens[batch.completion] = torch.arange(int(batch.completion.sum())) % 8 + 3
        masks = masking.fully_masked(batch.completion)
        (work,) = likelihood.plan(batch, masks, 1 << 14)
        assert len(work.example) == copies and len(work.row) == 8
        torch.testing.assert_close(
            likelihood.estimate(denoiser, batch, masks).token_logp, naive(denoiser, batch, masks), atol=ATOL_F64, rtol=0
        )
