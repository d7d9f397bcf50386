"""Digests of weights: any change of value, place, name, shape or dtype shows, and devices and layouts do not."""

from __future__ import annotations

import pytest
import torch

from dllm_rl.models.digest import digest, tensor_digest, tensor_digests

LARGE = torch.arange(300_000, dtype=torch.float32)  # more than one block of words


@pytest.mark.parametrize("place", [0, 1, 65_535, 65_536, 131_072, 299_999])
@pytest.mark.parametrize("bit", [0, 7, 22, 31])
def test_one_flipped_bit_shows(place, bit):
    changed = LARGE.clone()
    changed.view(torch.int32)[place] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    assert tensor_digest(changed) != tensor_digest(LARGE)


@pytest.mark.parametrize("size", range(20))
def test_every_byte_counts_whatever_the_length(size):
    value = torch.arange(size, dtype=torch.uint8) + 1
    seen = {tensor_digest(value)}
    for place in range(size):
        changed = value.clone()
        changed[place] ^= 1
        seen.add(tensor_digest(changed))
    assert len(seen) == size + 1
    assert tensor_digest(torch.cat([value, torch.zeros(1, dtype=torch.uint8)])) not in seen


@pytest.mark.parametrize(("first", "second"), [(0, 2), (0, 65_536), (10, 131_082), (2, 262_146)])
def test_words_that_change_places_show(first, second):
    changed = LARGE.clone()
    changed[[first, second]] = LARGE[[second, first]]
    assert tensor_digest(changed) != tensor_digest(LARGE)


def test_layout_in_memory_does_not_matter():
    square = LARGE[:90_000].view(300, 300)
    assert tensor_digest(square.t().contiguous().t()) == tensor_digest(square)
    shifted = torch.cat([torch.zeros(1), LARGE])[1:]  # begins at an odd multiple of four bytes
    assert tensor_digest(shifted) == tensor_digest(LARGE)


def test_names_shapes_and_dtypes_belong_to_it():
    value = torch.ones(4, 2)
    assert digest([("a", value), ("b", LARGE)]) == digest([("b", LARGE), ("a", value)])
    others = [("b", value)], [("a", value.t())], [("a", value.view(torch.int32))], [("a", value), ("c", value)]
    assert len({digest(one) for one in [[("a", value)], *others]}) == 5
    assert tensor_digests([("a", value)])["a"] != tensor_digests([("a", value * 2)])["a"]


def test_bfloat16_has_one_too():
    value = LARGE.bfloat16()
    assert tensor_digest(value) == tensor_digest(value.clone()) != tensor_digest(-value)
