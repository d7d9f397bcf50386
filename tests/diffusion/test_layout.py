"""Block numbers and block-causal attention, by hand."""

from __future__ import annotations

import torch

from dllm_rl.diffusion.layout import block_causal, block_index, clean_and_noised


def test_blocks_from_the_response():
    assert block_index(torch.tensor([3, 2]), 7, 2).tolist() == [[-2, -1, -1, 0, 0, 1, 1], [-1, -1, 0, 0, 1, 1, 2]]


def test_blocks_from_the_sequence_ignore_the_prompt():
    assert block_index(torch.tensor([3, 2]), 7, 2, "sequence").tolist() == [[0, 0, 1, 1, 2, 2, 3]] * 2


def test_block_causal_sees_its_own_block_and_earlier_ones_but_no_padding():
    blocks = torch.tensor([[0, 0, 1, 1]])
    valid = torch.tensor([[True, True, True, False]])
    assert block_causal(blocks, valid)[0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]


def test_clean_and_noised_by_hand():
    blocks = torch.tensor([[0, 0, 1]])
    attention = clean_and_noised(blocks, torch.ones(1, 3, dtype=torch.bool))[0].int().tolist()
    assert attention == [
        [1, 1, 0, 0, 0, 0],  # clean block 0 sees clean block 0
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],  # clean block 1 sees clean 0 and 1
        [0, 0, 0, 1, 1, 0],  # noised block 0 sees noised block 0
        [0, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],  # noised block 1 sees clean block 0 and noised block 1
    ]
