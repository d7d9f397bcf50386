"""Confidence intervals against published values, enumeration and a bootstrap."""

from __future__ import annotations

import math

import pytest

from dllm_rl.evaluation.intervals import paired_difference, wilson
from dllm_rl.seeding import python_random


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_the_table(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_rounding_never_puts_the_figure_outside_of_its_interval():
    for n in range(1, 300):
        for successes in {0, n // 3, n}:
            low, high = wilson(successes, n)
            assert 0 <= low <= successes / n <= high <= 1


def test_wilson_is_symmetric_and_needs_data():
    low, high = wilson(7, 10)
    assert wilson(3, 10) == pytest.approx((1 - high, 1 - low))
    with pytest.raises(ValueError, match="at least one observation"):
        wilson(0, 0)


def test_wilson_covers_as_often_as_it_says():
    """Exact coverage at n = 50, averaged over p: the interval is meant to be right 95% of the time."""
    n, coverage = 50, []
    for p in [i / 20 for i in range(1, 20)]:
        covered = 0.0
        for k in range(n + 1):
            low, high = wilson(k, n)
            covered += math.comb(n, k) * p**k * (1 - p) ** (n - k) * (low <= p <= high)
        coverage.append(covered)
    assert sum(coverage) / len(coverage) == pytest.approx(0.95, abs=0.01)
    assert min(coverage) > 0.92


def test_paired_difference_equals_a_bootstrap():
    draw = python_random(0, "bootstrap")
    before = [float(draw.random() < 0.4) for _ in range(400)]
    after = [max(b, float(draw.random() < 0.2)) for b in before]
    mean, low, high = paired_difference(before, after)
    assert mean == pytest.approx(sum(after) / 400 - sum(before) / 400)
    gains = [a - b for a, b in zip(after, before, strict=True)]
    means = sorted(sum(draw.choices(gains, k=400)) / 400 for _ in range(4000))
    assert (low, high) == pytest.approx((means[100], means[3900]), abs=0.006)


def test_paired_difference_uses_the_pairs():
    """Equal marginals, opposite pairing: the interval must differ."""
    same = paired_difference([1, 1, 0, 0] * 50, [1, 1, 0, 0] * 50)
    assert same == (0, 0, 0)
    swapped = paired_difference([1, 1, 0, 0] * 50, [0, 0, 1, 1] * 50)
    assert swapped[0] == 0 and swapped[2] > 0.1
    for before, after in (([1], [1]), ([1, 0], [1])):
        with pytest.raises(ValueError, match="same two or more examples"):
            paired_difference(before, after)
