"""The two laws of mask samplers: no peeking, partition of unity; by enumeration of every mask on a tiny completion."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dllm_rl.diffusion import masking
from dllm_rl.diffusion.layout import block_index
from dllm_rl.seeding import generator_for

PROMPT, LENGTH = 2, 3  # two prompt tokens, three completion tokens, one padding position
COMPLETION = torch.tensor([False] * PROMPT + [True] * LENGTH + [False])
SUBSETS = [s for n in range(LENGTH + 1) for s in itertools.combinations(range(LENGTH), n)]
ROWS = 40_000


def _uniform_subset(n):
    return 1 / math.comb(LENGTH, n)


BLOCKS = torch.tensor([-1, -1, 0, 0, 1, 2])  # blocks of two: tokens 0 and 1, then token 2


def _blocks(completion, generator, **options):
    return masking.blockwise_count(completion, BLOCKS.expand_as(completion), generator=generator, **options)


# Each sampler with its draws k as {subset: (probability, weight on its members, all the same or one each)}: the closed
# form, written by hand.
EXACT = {
    "fully_masked": (
        lambda c, g: masking.fully_masked(c, generator=g),
        [{(0, 1, 2): (1.0, 1.0)}],
    ),
    "bernoulli at t=0.3": (
        lambda c, g: masking.bernoulli(c, t_min=0.3, t_max=0.3, generator=g),
        [{s: (0.3 ** len(s) * 0.7 ** (LENGTH - len(s)), 1 / 0.3) for s in SUBSETS}],
    ),
    "uniform_count": (
        lambda c, g: masking.uniform_count(c, generator=g),
        [{s: (_uniform_subset(len(s)) / LENGTH, LENGTH / len(s)) for s in SUBSETS if s}],
    ),
    "uniform_count, 2 draws": (
        lambda c, g: masking.uniform_count(c, draws=2, generator=g),
        [{s: (_uniform_subset(len(s)) / LENGTH, LENGTH / len(s) / 2) for s in SUBSETS if s}] * 2,
    ),
    "complementary_pair at t=0.3": (
        lambda c, g: masking.complementary_pair(c, t_min=0.3, t_max=0.3, generator=g),
        [
            {s: (0.3 ** len(s) * 0.7 ** (LENGTH - len(s)), 0.5 / 0.3) for s in SUBSETS},
            {s: (0.7 ** len(s) * 0.3 ** (LENGTH - len(s)), 0.5 / 0.7) for s in SUBSETS},
        ],
    ),
    "complementary_pair with the full view at t=0.3": (
        lambda c, g: masking.complementary_pair(c, t_min=0.3, t_max=0.3, full_view=True, generator=g),
        [
            {s: (0.3 ** len(s) * 0.7 ** (LENGTH - len(s)), 1 / 0.3 / 3) for s in SUBSETS},
            {s: (0.7 ** len(s) * 0.3 ** (LENGTH - len(s)), 1 / 0.7 / 3) for s in SUBSETS},
            {(0, 1, 2): (1.0, 1 / 3)},
        ],
    ),
    "complementary_count": (  # counts 0..3, each with probability 1/4
        lambda c, g: masking.complementary_count(c, generator=g),
        [{s: (_uniform_subset(len(s)) / 4, 4 / max(1, len(s)) / 2) for s in SUBSETS}] * 2,
    ),
    "blockwise_count": (  # block {0, 1} or {2} with 1/2 each, 1 or 2 of two tokens with 1/2 each
        lambda c, g: _blocks(c, g),
        [
            {
                (0, 2): (1 / 8, {0: 2 * 2 / 1, 2: 2 / 2}),
                (1, 2): (1 / 8, {1: 2 * 2 / 1, 2: 2 / 2}),
                (0, 1, 2): (1 / 4, {0: 2 * 2 / 2, 1: 2 * 2 / 2, 2: 2 / 2}),
                (2,): (1 / 2, {2: 2 / 2 * 1 / 1}),
            }
        ],
    ),
    "blockwise_count, 2 draws": (
        lambda c, g: _blocks(c, g, draws=2),
        [
            {
                (0, 2): (1 / 8, {0: 2, 2: 1 / 2}),
                (1, 2): (1 / 8, {1: 2, 2: 1 / 2}),
                (0, 1, 2): (1 / 4, {0: 1, 1: 1, 2: 1 / 2}),
                (2,): (1 / 2, {2: 1 / 2}),
            }
        ]
        * 2,
    ),
    "blockwise_count, together": (
        lambda c, g: _blocks(c, g, together=True),
        [{(0, 2): (1 / 4, {0: 2, 2: 1}), (1, 2): (1 / 4, {1: 2, 2: 1}), (0, 1, 2): (1 / 2, 1)}],
    ),
    "quadrature, 2 nodes": (  # t = 0.211, 0.789 of 3 tokens: 1 and 2 tokens
        lambda c, g: masking.quadrature(c, nodes=2, generator=g),
        [
            {s: (_uniform_subset(1), 0.5 * 3 / 1) for s in SUBSETS if len(s) == 1},
            {s: (_uniform_subset(2), 0.5 * 3 / 2) for s in SUBSETS if len(s) == 2},
        ],
    ),
    "quadrature, 1 node, 2 draws": (  # t = 0.5 of 3 tokens: round half to even, 2 tokens
        lambda c, g: masking.quadrature(c, nodes=1, draws=2, generator=g),
        [{s: (_uniform_subset(2), 3 / 2 / 2) for s in SUBSETS if len(s) == 2}] * 2,
    ),
    "at_rate 0.4": (  # 1.2 of 3 tokens: 1 token
        lambda c, g: masking.at_rate(c, torch.full((len(c),), 0.4), generator=g),
        [{s: (_uniform_subset(1), 3.0) for s in SUBSETS if len(s) == 1}],
    ),
}


def _weight(w, subset, i):
    return w.get(i, 0) if isinstance(w, dict) else w * (i in subset)


@pytest.mark.parametrize("name", EXACT)
def test_closed_form_is_a_partition_of_unity(name):
    for i in range(LENGTH):
        total = sum(p * _weight(w, s, i) for draw in EXACT[name][1] for s, (p, w) in draw.items())
        assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_sampler_follows_its_closed_form(name):
    """Every mask that can occur occurs with its probability (4.5 standard errors) and carries exactly its weight."""
    sampler, draws = EXACT[name]
    sample = sampler(COMPLETION.expand(ROWS, -1), generator_for(0, name))
    assert sample.mask.shape == sample.weight.shape == (len(draws), ROWS, len(COMPLETION))
    assert sample.mask.dtype == torch.bool and sample.weight.dtype == torch.float32
    assert not sample.mask[..., ~COMPLETION].any() and not sample.weight[..., ~COMPLETION].any()
    for mask, weight, closed in zip(sample.mask, sample.weight, draws, strict=True):
        code = (mask[:, COMPLETION] * 2 ** torch.arange(LENGTH)).sum(-1)
        impossible = set(range(2**LENGTH))
        for subset, (p, w) in closed.items():
            number = sum(2**i for i in subset)
            impossible.discard(number)
            rows = weight[:, COMPLETION][code == number]
            expected = torch.tensor([float(_weight(w, subset, i)) for i in range(LENGTH)])
            torch.testing.assert_close(rows, expected.expand_as(rows), rtol=1e-6, atol=0)
            assert abs(len(rows) / ROWS - p) <= 4.5 * math.sqrt(p * (1 - p) / ROWS) + 1e-12, (
                subset,
                len(rows) / ROWS,
                p,
            )
        assert not torch.isin(code, torch.tensor(sorted(impossible))).any()


RAGGED = torch.tensor(
    [
        [False, True, True, True, True, True, True],
        [False, True, False, False, False, False, False],
        [False, False, True, True, False, True, False],
    ]
)


def _ragged_blocks(completion):
    return block_index(torch.tensor([1, 1, 2]).repeat(len(completion) // 3), completion.shape[1], 2)


SAMPLERS = {
    "fully_masked": lambda c, g: masking.fully_masked(c, prompt=~c, prompt_mask_rate=0.4, draws=2, generator=g),
    "bernoulli": lambda c, g: masking.bernoulli(c, draws=3, t_min=0.1, generator=g),
    "uniform_count": lambda c, g: masking.uniform_count(c, draws=3, generator=g),
    "complementary_pair": lambda c, g: masking.complementary_pair(c, pairs=2, generator=g),
    "complementary_pair, full view": lambda c, g: masking.complementary_pair(c, pairs=2, full_view=True, generator=g),
    "complementary_count": lambda c, g: masking.complementary_count(c, pairs=2, generator=g),
    "blockwise_count": lambda c, g: masking.blockwise_count(c, _ragged_blocks(c), draws=3, generator=g),
    "blockwise_count, together": lambda c, g: masking.blockwise_count(
        c, _ragged_blocks(c), draws=2, together=True, generator=g
    ),
    "left_to_right": lambda c, g: masking.left_to_right(c, c),
    "quadrature": lambda c, g: masking.quadrature(c, nodes=3, draws=2, generator=g),
    "at_rate": lambda c, g: masking.at_rate(c, torch.rand(len(c), generator=g), generator=g),
    "uniform_count, blocks": lambda c, g: masking.uniform_count(
        c, draws=2, block_ids=torch.arange(7).div(2, rounding_mode="floor").expand(c.shape), generator=g
    ),
    "along_trajectory": lambda c, g: masking.along_trajectory(
        torch.where(c, torch.randint(0, 4, c.shape, generator=g), -1), c
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_laws_on_ragged_rows(name):
    many = RAGGED.repeat(4000, 1)
    sample = SAMPLERS[name](many, generator_for(1, name))
    assert not ((sample.weight != 0) & ~sample.mask).any(), "scored a visible token"
    total = sample.weight.double().sum(0).view(4000, *RAGGED.shape)
    error = total.std(0) / math.sqrt(4000)
    assert ((total.mean(0) - RAGGED.double()).abs() <= 4.5 * error + 1e-6).all()
    assert not total[:, ~RAGGED].any(), "scored a token off the completion"


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_generator_state_gives_the_same_draws(name):
    first, second = (SAMPLERS[name](RAGGED, generator_for(2, name)) for _ in range(2))
    assert torch.equal(first.mask, second.mask) and torch.equal(first.weight, second.weight)


def test_fully_masked_hides_prompt_tokens_at_the_rate_and_never_scores_them():
    prompt = torch.zeros_like(COMPLETION)
    prompt[:PROMPT] = True
    completion, prompts = COMPLETION.expand(ROWS, -1), prompt.expand(ROWS, -1)
    sample = masking.fully_masked(completion, prompt=prompts, prompt_mask_rate=0.15, generator=generator_for(0, "p"))
    rate = sample.mask[0][:, :PROMPT].double().mean(0)
    assert ((rate - 0.15).abs() <= 4.5 * math.sqrt(0.15 * 0.85 / ROWS)).all()
    assert sample.mask[0][:, COMPLETION].all() and not sample.mask[0][:, -1].any()


def test_pairs_are_complements_and_counts_are_stratified():
    completion = torch.ones(500, 8, dtype=torch.bool)
    pair = masking.complementary_pair(completion, pairs=3, generator=generator_for(0))
    assert torch.equal(pair.mask[0::2] ^ pair.mask[1::2], completion.expand(3, -1, -1))
    counts = masking.uniform_count(completion, draws=8, generator=generator_for(0)).mask.sum(-1)  # (8, 500)
    assert torch.equal(counts.sort(0).values, torch.arange(1, 9)[:, None].expand(8, 500)), "8 draws cover 1..8"


def test_draws_of_a_row_choose_different_blocks_and_hide_what_comes_later():
    completion = torch.ones(300, 12, dtype=torch.bool)
    completion[100:, 7:] = False  # four blocks of three, or two and a third that holds one token
    ids = (torch.arange(12) // 3).expand(300, -1)
    sample = masking.blockwise_count(completion, ids, draws=3, generator=generator_for(0))
    chosen = torch.where(sample.mask, ids, 99).amin(-1)  # (3, 300)
    assert (chosen.sort(0).values.diff(dim=0) > 0).all(), "three draws, three blocks"
    assert chosen[:, 100:].max() == 2 and set(chosen[:, :100].flatten().tolist()) == {0, 1, 2, 3}
    later = ids > chosen[..., None]
    assert torch.equal(sample.mask & later, completion & later)
    blocks = torch.where(completion[:, -1:], 4, 3)
    torch.testing.assert_close(sample.weight[later], (completion * blocks / (ids + 1) / 3).expand(3, -1, -1)[later])


def test_quadrature_integrates_polynomials_exactly():
    """Gauss-Legendre with q nodes is exact up to degree 2q - 1; here counts are nearly exact shares."""
    for nodes in range(1, 6):
        completion = torch.ones(1, 10_000, dtype=torch.bool)
        sample = masking.quadrature(completion, nodes=nodes, generator=generator_for(0))
        count = sample.mask.sum(-1).double()[:, 0]
        weight = sample.weight.double().sum(-1)[:, 0] / 10_000  # the node's weight
        for degree in range(2 * nodes):
            integral = (weight * (count / 10_000) ** degree).sum().item()
            assert integral == pytest.approx(1 / (degree + 1), abs=2e-4)  # counts are rounded to 1e-4


def test_trajectory_by_enumeration_of_every_step_assignment():
    """All 3^3 assignments of steps to three tokens: hidden exactly while uncommitted, scored exactly once."""
    assignments = list(itertools.product(range(3), repeat=LENGTH))
    step = torch.tensor([[-1] * PROMPT + list(a) + [-1] for a in assignments])
    sample = masking.along_trajectory(step, COMPLETION.expand(len(step), -1))
    for row, assignment in enumerate(assignments):
        distinct = sorted(set(assignment))
        for k in range(len(sample.mask)):
            hidden = [k < len(distinct) and s >= distinct[k] for s in assignment]
            scored = [float(k < len(distinct) and s == distinct[k]) for s in assignment]
            assert sample.mask[k, row, PROMPT:-1].tolist() == hidden
            assert sample.weight[k, row, PROMPT:-1].tolist() == scored
        assert not sample.mask[:, row, :PROMPT].any() and not sample.mask[:, row, -1].any()


def test_trajectory_replays_the_tail_without_scoring_it():
    """Canvas: three scored tokens, then EOS tail: one decoded at step 1, one never decoded (step 4 = num_forwards)."""
    step = torch.tensor([[-1, 3, 0, 2, 1, 4]])
    completion = torch.tensor([[False, True, True, True, False, False]])
    sample = masking.along_trajectory(step, completion)
    states = sample.mask[:, 0].int().tolist()
    assert states == [[0, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1], [0, 1, 0, 0, 0, 1]]  # before steps 0, 2, 3
    assert sample.weight.sum(0).tolist() == completion.float().tolist()


def test_trajectory_of_a_block_model_replays_all_blocks_side_by_side():
    step = torch.tensor([[-1, -1, 1, 0, 3, 2, 5, 4]])
    blocks = torch.tensor([[-1, -1, 0, 0, 1, 1, 2, 2]])
    sample = masking.along_trajectory(step, step >= 0, block_ids=blocks)
    assert sample.mask[:, 0].int().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 0, 1, 0]]
    assert sample.weight[:, 0].int().tolist() == [[0, 0, 0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 1, 0, 1, 0]]


def test_merged_steps_share_the_state_before_the_first_of_them():
    step = torch.tensor([[-1, 0, 3, 1, 6, 4, 9]])  # distinct steps 0 1 | 3 4 | 6, the tail is never decoded
    completion = torch.tensor([[False, True, True, True, True, True, False]])
    sample = masking.along_trajectory(step, completion, merge=2)
    assert sample.mask[:, 0].int().tolist() == [[0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 0, 1]]
    assert sample.weight[:, 0].int().tolist() == [[0, 1, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0]]
    with pytest.raises(ValueError, match="merge = 0: must be at least 1"):
        masking.along_trajectory(step, completion, merge=0)


@pytest.mark.parametrize("segments", range(1, 7))
def test_segments_by_enumeration_of_every_step_assignment(segments):
    """All 5^3 ways in which 5 forwards commit three tokens: scored once, in the state before the token's segment."""
    forwards = 5
    starts = [n * forwards // segments for n in range(segments)]  # first forward of each segment, as released
    assignments = list(itertools.product(range(forwards), repeat=LENGTH))
    step = torch.tensor([[-1] * PROMPT + list(a) + [-1] for a in assignments])
    number = torch.full((len(step),), forwards)
    sample = masking.along_segments(step, COMPLETION.expand(len(step), -1), num_forwards=number, segments=segments)
    assert len(sample.mask) <= min(segments, LENGTH)
    for row, assignment in enumerate(assignments):
        start = [max(s for s in starts if s <= step) for step in assignment]  # of each token's segment
        states = sorted(set(start))
        for k in range(len(sample.mask)):
            hidden = [k < len(states) and s >= states[k] for s in assignment]
            scored = [float(k < len(states) and s == states[k]) for s in start]
            assert sample.mask[k, row, PROMPT:-1].tolist() == hidden
            assert sample.weight[k, row, PROMPT:-1].tolist() == scored
        assert not sample.mask[:, row, :PROMPT].any() and not sample.mask[:, row, -1].any()


def test_segments_are_parts_of_a_rows_own_forwards_and_replay_the_tail():
    """Rows of 6 and 2 forwards in 2 segments; in the first, one position of the tail is decoded late, one never."""
    step = torch.tensor([[-1, 5, 0, 2, 4, 6], [-1, 0, 1, -1, -1, -1]])
    completion = torch.tensor([[False, True, True, True, False, False], [False, True, True, False, False, False]])
    sample = masking.along_segments(step, completion, num_forwards=torch.tensor([6, 2]), segments=2)
    assert sample.mask[:, 0].int().tolist() == [[0, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 1]]
    assert sample.weight[:, 0].int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert sample.mask[:, 1].int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    with pytest.raises(ValueError, match="segments = 0: must be at least 1"):
        masking.along_segments(step, completion, num_forwards=torch.tensor([6, 2]), segments=0)


def test_segments_of_a_block_model_keep_earlier_blocks_in_sight():
    """Two blocks of two, a forward each token: a segment is scored block by block, all blocks in one draw."""
    step, blocks = torch.tensor([[-1, 1, 0, 2, 3]]), torch.tensor([[-1, 0, 0, 1, 1]])
    sample = masking.along_segments(
        step, step >= 0, num_forwards=torch.tensor([4]), segments=2, block_ids=blocks
    )  # segments {0, 1} and {2, 3}
    assert sample.mask[:, 0].int().tolist() == [[0, 1, 1, 1, 1]] and sample.weight[:, 0].sum() == 4
    every = masking.along_segments(step, step >= 0, num_forwards=torch.tensor([4]), segments=4, block_ids=blocks)
    exact = masking.along_trajectory(step, step >= 0, block_ids=blocks)
    assert torch.equal(every.mask, exact.mask) and torch.equal(every.weight, exact.weight)


def test_left_to_right_hides_a_token_and_what_follows_but_not_what_was_given():
    canvas = torch.tensor([[False, True, False, True, True]])  # position 2 is an injected token, 4 the tail
    completion = torch.tensor([[False, True, False, True, False]])
    sample = masking.left_to_right(canvas, completion)
    assert sample.mask[:, 0].int().tolist() == [[0, 1, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert sample.weight[:, 0].int().tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
    blocks = torch.tensor([[-1, 0, 0, 1, 1]])
    sample = masking.left_to_right(blocks >= 0, blocks >= 0, block_ids=blocks)
    assert sample.mask[:, 0].int().tolist() == [[0, 1, 1, 1, 1], [0, 0, 1, 0, 1]]
    assert sample.weight[:, 0].int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 0, 1]]


def test_released_quadrature_weights_lose_what_the_floor_cuts_off():
    """t = 0.211, 0.789 of 4 tokens: counts floor to 1 (never 0) and 3 with weights 1/t, where 4/1 and 4/3 are right."""
    completion = torch.ones(1, 4, dtype=torch.bool)
    t = (1 - 3**-0.5) / 2
    sample = masking.quadrature(completion, nodes=2, floor=True, generator=generator_for(0))
    assert sample.mask.sum(-1).flatten().tolist() == [1, 3]
    assert sample.weight.amax(-1).flatten().tolist() == pytest.approx([0.5 / t, 0.5 / (1 - t)])


def test_counts_of_blocks_by_enumeration():
    """Blocks {0, 1} and {2}: counts U{1, 2} and 1, so masks 02, 12 at 1/4 and 012 at 1/2, weights 2/n and 1/1."""
    exact = {(0, 2): (0.25, [2.0, 0.0, 1.0]), (1, 2): (0.25, [0.0, 2.0, 1.0]), (0, 1, 2): (0.5, [1.0, 1.0, 1.0])}
    for i in range(LENGTH):
        assert sum(p * w[i] for p, w in exact.values()) == 1.0, "a partition of unity"
    blocks = torch.tensor([-1, -1, 0, 0, 1, 1]).expand(ROWS, -1)
    sample = masking.uniform_count(COMPLETION.expand(ROWS, -1), block_ids=blocks, generator=generator_for(0))
    assert not sample.mask[..., ~COMPLETION].any() and not sample.weight[..., ~COMPLETION].any()
    found = 0
    for subset, (p, weight) in exact.items():
        rows = (sample.mask[0][:, COMPLETION] == torch.tensor([i in subset for i in range(LENGTH)])).all(-1)
        assert abs(rows.double().mean() - p) <= 4.5 * math.sqrt(p * (1 - p) / ROWS)
        assert torch.equal(sample.weight[0][rows][:, COMPLETION], torch.tensor(weight).expand(int(rows.sum()), -1))
        found += int(rows.sum())
    assert found == ROWS, "a mask that cannot be"


def test_every_block_has_counts_of_its_own_stratified_over_draws():
    blocks = torch.arange(3).repeat_interleave(4).expand(200, -1)
    completion = torch.ones_like(blocks, dtype=torch.bool)
    completion[:, 10:] = False  # the last block ends early: 4, 4 and 2 tokens
    sample = masking.uniform_count(completion, draws=4, block_ids=blocks, generator=generator_for(0))
    counts = sample.mask.view(4, 200, 3, 4).sum(-1)
    assert torch.equal(counts[..., :2].sort(0).values, torch.arange(1, 5)[:, None, None].expand(4, 200, 2))
    assert torch.equal(counts[..., 2].sort(0).values, torch.tensor([1, 1, 2, 2])[:, None].expand(4, 200))
    assert 0.15 < (counts[..., 0] == counts[..., 1]).double().mean() < 0.35, "one block does not follow another"


def test_one_block_has_the_draws_of_none():
    plain = masking.uniform_count(RAGGED, draws=3, generator=generator_for(0))
    one = masking.uniform_count(RAGGED, draws=3, block_ids=torch.full(RAGGED.shape, 7), generator=generator_for(0))
    assert torch.equal(plain.mask, one.mask) and torch.equal(plain.weight, one.weight)


def test_rates_are_shares_of_a_rows_own_completion():
    """Rows of 6, 1 and 3 completion tokens; one token is hidden even at rate 0, all of them at rate 1."""
    for rate, counts in ((0.0, [1, 1, 1]), (0.5, [3, 1, 2]), (0.8, [5, 1, 2]), (1.0, [6, 1, 3])):
        sample = masking.at_rate(RAGGED, torch.full((3,), rate), generator=generator_for(0))
        assert sample.mask.sum(-1).tolist() == [counts], rate
    sample = masking.at_rate(RAGGED, torch.tensor([0.5, 1.0, 0.0]), generator=generator_for(0))
    assert sample.mask.sum(-1).tolist() == [[3, 1, 1]], "a rate for each row"


def test_hiding_adds_positions_without_scoring_them():
    also = torch.zeros(1, len(COMPLETION), dtype=torch.bool)
    also[0, -1] = True
    sample = masking.uniform_count(COMPLETION[None], draws=2, generator=generator_for(0))
    more = sample.also_masking(also)
    assert more.mask[:, 0, -1].all() and torch.equal(more.weight, sample.weight)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: masking.quadrature(COMPLETION[None], nodes=6, generator=g), "nodes = 6"),
        (lambda g: masking.bernoulli(COMPLETION[None], t_min=0.0, generator=g), "t_min = 0.0"),
        (lambda g: masking.complementary_pair(COMPLETION[None], t_max=1.0, generator=g), "t_max = 1.0"),
        (lambda g: masking.uniform_count(torch.zeros(2, 3, dtype=torch.bool), generator=g), "row 0 has no completion"),
        (lambda g: masking.uniform_count(COMPLETION[None], draws=0, generator=g), "draws = 0"),
        (lambda g: masking.fully_masked(COMPLETION[None], prompt_mask_rate=1.5), "prompt_mask_rate = 1.5"),
        (lambda g: masking.at_rate(COMPLETION[None], torch.tensor([1.1]), generator=g), r"rate = \[1.1"),
        (lambda g: masking.along_trajectory(torch.full((1, 6), -1), COMPLETION[None]), "no unmask step"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(generator_for(0))
