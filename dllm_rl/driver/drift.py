"""Stops a run whose model becomes overconfident: it commits more tokens per forward, and is right less often.

A strategy that reads confidences decodes the next batch by what training has made of them. Once they are inflated,
forwards commit more tokens than the model can tell apart, and soon no group has a right completion to learn from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from dllm_rl.config.schema import DriftSection

FILE = "drift.json"
FIGURES = ("tokens_per_forward", "confidence", "reward")


class DriftGuard:
    """Compares the last steps of a run with its first ones."""

    def __init__(self, limits: DriftSection) -> None:
        """Nothing has been seen.

        Args:
            limits: how far figures may move.
        """
        self._limits = limits
        self._first: dict[int, list[float]] = {}  # step -> FIGURES
        self._last: dict[int, list[float]] = {}

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the figures of a step; those of later ones are forgotten, since the run has gone back.

        Args:
            step: finished optimiser steps, from 1.
            metrics: of its batch. A step without a reward, since no row could be scored, says nothing.
        """
        first, last = ({at: one for at, one in seen.items() if at < step} for seen in (self._first, self._last))
        if all(name in metrics for name in FIGURES):
            last[step] = [metrics[name] for name in FIGURES]
            if step < min(first, default=step) + self._limits.window:
                first[step] = last[step]
        self._first, self._last = first, dict(list(last.items())[-self._limits.window :])

    @property
    def verdict(self) -> str | None:
        """What has moved too far, in one line; None while nothing has, or too few steps are over."""
        c = self._limits
        if len(self._last) < c.window or self._last.keys() & self._first.keys():
            return None
        before, now = (
            dict(zip(FIGURES, map(fmean, zip(*seen.values(), strict=True)), strict=True))
            for seen in (self._first, self._last)
        )
        if c.reward_gain is not None and now["reward"] - before["reward"] > c.reward_gain:
            return None
        faster = c.tokens_per_forward is not None and (
            now["tokens_per_forward"] > c.tokens_per_forward * before["tokens_per_forward"]
        )
        surer = c.confidence is not None and now["confidence"] > before["confidence"] + c.confidence
        if not faster and not surer:
            return None
        name = "tokens_per_forward" if faster else "confidence"
        moved = " and ".join(f"{one} from {before[one]:.3g} to {now[one]:.3g}" for one in (name, "reward"))
        return f"{moved}, beyond drift.{name} = {getattr(c, name)}"

    def save(self, folder: Path) -> None:
        """Write what has been seen, so that a resumed run compares with the same first steps."""
        (folder / FILE).write_text(json.dumps([self._first, self._last]), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Restore what save wrote; a checkpoint of a version that wrote nothing starts the comparison anew."""
        path = folder / FILE
        saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else [{}, {}]
        self._first, self._last = ({int(at): figures for at, figures in seen.items()} for seen in saved)
