"""Coupled-GRPO's views: one per half, and as released a full one on top without making room for it."""

from __future__ import annotations

import torch

from dllm_rl.config.plugins import build
from dllm_rl.conformance import cases


def drawn(**options):
    batch = cases.batch(block_causal=False)
    masks = build("algorithms", "coupled_grpo", options).masks(batch, torch.Generator().manual_seed(3))
    return batch.completion, masks.mask, masks.weight


def test_a_pair_hides_every_token_once_at_complementary_rates():
    where, mask, weight = drawn()
    first, second = mask[0] & where, mask[1] & where
    assert torch.equal(first ^ second, where)
    for row in range(len(where)):
        rate = 1 / (2 * weight[0, row][first[row]]), 1 - 1 / (2 * weight[1, row][second[row]])
        known = torch.cat(rate)
        torch.testing.assert_close(known, known[:1].expand_as(known))


def test_the_released_estimator_is_the_pair_and_half_of_the_full_view():
    where, _, pair = drawn()
    _, mask, released = drawn(paper_exact=True)
    assert torch.equal(released[:2], pair), "1/2 (m/t + (1-m)/(1-t)), as without the full view"
    assert (mask[2] & where).equal(where)
    torch.testing.assert_close(released[2], 0.5 * where)


def test_the_full_view_takes_its_share_from_the_pair():
    where, _, pair = drawn()
    _, _, three = drawn(full_view=True)
    torch.testing.assert_close(three[:2], pair * 2 / 3)
    torch.testing.assert_close(three[2], where / 3)
