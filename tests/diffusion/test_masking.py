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
