"""Samplers that replay trajectories, and those that count in blocks: by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dllm_rl.diffusion import masking
from dllm_rl.seeding import generator_for
from tests.diffusion.test_masking import COMPLETION, LENGTH, PROMPT, RAGGED, ROWS


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
