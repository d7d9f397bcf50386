"""Hints: cut, revealed, spread; and which of their tokens are trained on."""

from __future__ import annotations

import itertools

import pytest
import torch

from algorithms.igpo import cut_hint, least_sure
from dllm_rl.seeding import generator_for

TRACE = tuple(range(100, 116))


def cut(share=0.5, chunk=(2, 3), room=16, max_gap=100, seed=0, **more):
    return cut_hint(TRACE, share=share, chunk=chunk, room=room, max_gap=max_gap, generator=generator_for(seed), **more)


def test_everything_revealed_without_room_to_spread_is_the_trace():
    assert cut(share=1.0) == dict(enumerate(TRACE))


def test_without_room_to_spread_tokens_keep_their_places():
    for seed in range(50):
        given = cut(seed=seed)
        assert given and all(token == TRACE[offset] for offset, token in given.items())


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_the_share_of_chunks_is_revealed(share):
    """Chunks of one token: m - floor(m (1 - share)) of 16."""
    assert {len(cut(share=share, chunk=(1, 1), seed=seed)) for seed in range(20)} == {16 - int(16 * (1 - share))}


def test_every_chunk_is_revealed_as_often():
    seen = torch.zeros(16)
    for seed in range(800):
        seen[list(cut(share=0.25, chunk=(1, 1), seed=seed))] += 1
    assert ((seen / 800 - 0.25).abs() < 4.5 * (0.25 * 0.75 / 800) ** 0.5).all()


def test_chunks_are_spread_by_at_most_half():
    """Room for 24: the first chunk goes to floor(1.5 start), gaps grow by half, order and tokens stay."""
    for seed in range(50):
        given = cut(chunk=(2, 2), room=24, seed=seed)
        offsets, tokens = list(given), list(given.values())
        assert offsets == sorted(offsets) and tokens == sorted(tokens) and max(offsets) < 24
        starts = [i for i in range(0, len(tokens), 2)]
        place = end = 0
        for number in starts:  # the equation of the docstring, from what was revealed
            source = tokens[number] - 100
            place += int((source - end) * 1.5)
            assert offsets[number] == place
            place, end = place + 2, source + 2


def test_gaps_are_capped_and_what_leaves_the_room_is_dropped():
    assert all(b - a <= 3 for seed in range(50) for a, b in pairs(cut(max_gap=2, seed=seed, share=0.4)))
    assert all(max(cut(room=5, seed=seed, share=1.0)) < 5 for seed in range(50))


def pairs(given):
    offsets = list(given)
    return itertools.pairwise(offsets)


def test_the_last_chunk_is_revealed_only_for_certain_if_asked():
    assert all(15 in cut(share=0.2, chunk=(1, 1), seed=seed, reveal_last=True) for seed in range(30))
    assert not all(15 in cut(share=0.2, chunk=(1, 1), seed=seed) for seed in range(30))


def test_least_sure_by_hand():
    entropy = torch.tensor([[9.0, 1.0, 3.0, 2.0], [0.1, 0.2, 0.3, 0.4], [1.0, 1.0, 1.0, 1.0]])
    hint = torch.tensor([[False, True, True, True], [True, True, False, False], [False] * 4])
    assert least_sure(entropy, hint, 0.7).int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
