"""UniGRPO: masking rates on a grid over the updates of a step, and a loss that is a mean over masked tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dllm_rl.conformance.algorithms import Subject
from dllm_rl.seeding import generator_for

NAME = "algorithms.unigrpo:UniGRPO"


def drawn(updates, **options):
    subject = Subject(NAME, options)
    batch = subject.batch(block_causal=False)
    start = torch.rand(len(batch), generator=generator_for(5), dtype=torch.float64)  # the first numbers of the stream
    return batch, start, subject.algorithm.joint_masks(batch, generator_for(5), updates)


@pytest.mark.parametrize(
    ("grid", "rates"),
    [
        ("to_full", lambda t: [t, t + (1 - t) / 3, t + 2 * (1 - t) / 3, torch.ones_like(t)]),
        ("whole_range", lambda t: [t, (t + 0.25) % 1, (t + 0.5) % 1, (t + 0.75) % 1]),
    ],
)
def test_the_updates_of_a_step_walk_over_the_grid_from_one_start_per_row(grid, rates):
    batch, start, masks = drawn(4, grid=grid)
    length = batch.completion.sum(-1)
    for rate, one in zip(rates(start), masks, strict=True):
        count = (rate * length).round().clamp(min=1)
        assert torch.equal((one.mask[0] & batch.completion).sum(-1), count.long())
        assert one.mask[0][batch.tail].all() and not one.mask[0][~batch.completion & ~batch.tail].any()
    if grid == "to_full":
        assert torch.equal(masks[-1].mask[0] & batch.completion, batch.completion)


def test_a_single_update_draws_its_rate_from_the_whole_range():
    for grid in ("to_full", "whole_range"):
        batch, start, (only,) = drawn(1, grid=grid)
        count = (start * batch.completion.sum(-1)).round().clamp(min=1)
        assert torch.equal((only.mask[0] & batch.completion).sum(-1), count.long())


def test_at_the_old_policy_masked_tokens_share_their_rows_advantage():
    """d loss / d l_i = - A / (|M| N) where i is masked: the mean over the row's masked tokens, then over rows."""
    subject = Subject(NAME, {"beta": 0.0})
    seen = subject.experience(subject.batch(block_causal=True))
    _, gradient = subject.gradient(seen, seen.old)
    masked = seen.masks.weight[0] != 0
    want = torch.where(masked, -seen.advantage[:, None] / masked.sum(-1, keepdim=True) / len(seen.batch), 0.0).double()
    torch.testing.assert_close(gradient, want, atol=1e-7, rtol=1e-6)
    assert 0 < masked.sum() < seen.batch.completion.sum(), "some are masked, some are not"


def test_the_ratio_of_a_token_is_clipped_whatever_its_weight():
    """A row that moved by +1 nat per token: all of its ratios are clipped at A > 0, none at A < 0."""
    subject = Subject(NAME, {"beta": 0.0, "epsilon": 0.5})
    seen = subject.experience(subject.batch(block_causal=False))
    scored = seen.masks.weight != 0
    _, gradient = subject.gradient(
        seen, dataclasses.replace(seen.old, draw_token_logp=seen.old.draw_token_logp + scored)
    )
    moves = (gradient != 0).any(-1)
    assert torch.equal(moves, seen.advantage < 0)
