"""95% confidence intervals for proportions and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from dllm_rl.errors import UserError

_Z = NormalDist().inv_cdf(0.975)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson score interval of a proportion, 95%.

    Source: Wilson 1927; recommended for all n by Brown, Cai, DasGupta 2001.
    """
    if n < 1:
        raise UserError("a proportion needs at least one observation")
    p = successes / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # rounding must not put p outside


def paired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of after - before on the same examples: normal approximation on the differences, 95%."""
    if len(before) != len(after) or len(before) < 2:
        raise UserError(f"paired difference needs the same two or more examples, got {len(before)} and {len(after)}")
    differences = [b - a for a, b in zip(before, after, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    half = _Z * math.sqrt(variance / n)
    return mean, mean - half, mean + half
