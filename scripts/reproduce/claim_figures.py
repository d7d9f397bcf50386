"""A claim, its figures over seeds, and their verdicts. See claims.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllm_rl.errors import UserError

Results = Mapping[str, list[Any]]  # run or measurement -> one entry per seed

# Student's t, 97.5% quantiles for 1..9 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of one figure per seed: Student's t interval, 95%, for 2 to 10 seeds."""
    n = len(values)
    if not 2 <= n <= len(_T) + 1:
        raise UserError(f"an interval over seeds needs 2 to {len(_T) + 1} of them, got {n}")
    mean = sum(values) / n
    half = _T[n - 2] * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Figure:
    """A number per seed that the claim says is above a bound.

    Attributes:
        label: what it is.
        values: one per seed.
        above: the claimed bound.
        scale: for printing: 100 makes points of shares.
        unit: after the number.
    """

    label: str
    values: Sequence[float]
    above: float = 0.0
    scale: float = 1.0
    unit: str = ""

    @property
    def interval(self) -> tuple[float, float, float]:
        """(mean, low, high)."""
        return over_seeds(self.values)

    @property
    def verdict(self) -> str:
        """Whether the interval lies on the claimed side."""
        _, low, high = self.interval
        return "reproduced" if low > self.above else "not reproduced" if high < self.above else "inconclusive"

    def __str__(self) -> str:
        mean, low, high = (self.scale * x for x in self.interval)
        return f"{self.label}: {mean:+.2f}{self.unit} [{low:+.2f}, {high:+.2f}]"


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper and how it is tested.

    Attributes:
        text: the claim.
        source: where it is made.
        needs: runs and measurements.
        figures: results -> figures that must all hold.
        explain: further runs for --explain, thought of after the first look; they enter no verdict.
        also: results -> further lines for the report, without a verdict.
    """

    text: str
    source: str
    needs: Sequence[str]
    figures: Callable[[Results], list[Figure]]
    also: Callable[[Results], list[str]] = lambda results: []
    explain: Sequence[str] = ()
