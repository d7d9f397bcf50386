"""Randomness by counter."""

from __future__ import annotations

import math

import torch

from dllm_rl import seeding


def test_every_part_of_a_key_matters_and_types_are_told_apart():
    keys = [seeding.derive(*k) for k in [(0,), (1,), (0, "a"), (0, "b"), (0, 1), (0, "1"), (0, "a", 1), (0, "a1")]]
    assert len(set(keys)) == len(keys) and all(0 <= k < 2**63 for k in keys)


def test_generators_repeat():
    a, b = (torch.rand(4, generator=seeding.generator_for(3, "x", 1)) for _ in range(2))
    assert torch.equal(a, b)
    assert seeding.python_random(3, "x").random() == seeding.python_random(3, "x").random()


def test_uniform_is_a_pure_function_of_its_counters():
    rows, positions = torch.arange(50)[:, None] * 977, torch.arange(40)[None]
    whole = seeding.uniform(rows, 3, positions)
    assert torch.equal(whole[7:9, 5:], seeding.uniform(rows[7:9], 3, positions[:, 5:]))
    assert not torch.equal(whole, seeding.uniform(rows, 4, positions))


def test_uniform_looks_uniform_and_independent():
    n = 400
    u = seeding.uniform(torch.arange(n)[:, None], 0, torch.arange(n)[None])
    assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    counts = torch.histc(u, bins=20, min=0, max=1)
    expected = n * n / 20
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 19 + 5 * math.sqrt(2 * 19)
    for shifted in (u.roll(1, 0), u.roll(1, 1), u.T):
        correlation = torch.corrcoef(torch.stack([u.flatten(), shifted.flatten()]))[0, 1]
        assert abs(correlation) < 4 / n


def test_neighbouring_counters_do_not_commute():
    assert seeding.uniform(1, 2) != seeding.uniform(2, 1)
