"""Accuracy against forwards of the shared start, decoded by thresholds and by learned policies. See claims.py."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from claim_runs import CONFIGS, HARD, base_model, folder_of

from dllm_rl.driver.evaluate_target import evaluate_target
from dllm_rl.reports.progress import Quiet

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
BIASES = (-2.0, -1.0, 0.0, 1.0, 2.0)
POLICIES = ("policy", "policy, experts")
Point = tuple[float, float]  # forwards per board, accuracy


def _point(output: Path, seed: int, strategy: str) -> Point:
    shape = [f"model.path={base_model(output, seed)}", f"run.seed={seed}", f"evaluate.strategy={strategy}"]
    shape += ["evaluate.tokens_per_step=[1]", "evaluate.limit=512"]
    (result,) = evaluate_target(CONFIGS / "sudoku4_rl.yaml", shape, Quiet())
    return 16 / result.tokens_per_forward, result.success


def start(output: Path, seed: int) -> dict[str, Any]:
    """The shared start itself: boards at 1, 2 and 4 tokens per forward, hard ones at 4, its point at threshold 0.9."""
    shape = [f"model.path={base_model(output, seed)}", f"run.seed={seed}", "evaluate.tokens_per_step=[1, 2, 4]"]
    results = evaluate_target(CONFIGS / "sudoku4_rl.yaml", [*shape, "evaluate.limit=1024"], Quiet())
    hard = [*shape[:2], *HARD, "evaluate.every_steps=null"]
    (difficult,) = evaluate_target(CONFIGS / "sudoku4_rl.yaml", hard, Quiet())
    fast = _point(output, seed, "{name: confidence_threshold, threshold: 0.9}")
    return {"accuracy": {r.tokens_per_step: r.success for r in results}, "hard": difficult.success, "fast": fast}


def frontier(output: Path, seed: int) -> dict[str, list[Point]]:
    """Points of each decoder over its knob: the threshold, or the bias on a policy's utilities."""
    found = {"threshold": [_point(output, seed, f"{{name: confidence_threshold, threshold: {t}}}") for t in THRESHOLDS]}
    for name in POLICIES:
        path = next(folder_of(output, name, seed).glob("checkpoints/step-*/model"))
        found[name] = [_point(output, seed, f"{{name: learned, path: {path}, bias: {bias}}}") for bias in BIASES]
    return found


def at(points: Sequence[Point], forwards: float) -> float | None:
    """Accuracy at a number of forwards, linear between points; None outside them."""
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in itertools.pairwise(ordered):
        if x0 <= forwards <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (forwards - x0) / (x1 - x0)
    return None


def advantage_over(points: Mapping[str, Sequence[Point]], name: str, other: str) -> float | None:
    """Mean over a decoder's points of its accuracy minus the other's at equal forwards, where both are known."""
    gaps = [y - there for x, y in points[name] if (there := at(points[other], x)) is not None]
    return sum(gaps) / len(gaps) if gaps else None


def figures(per_seed: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per decoder for the report: forwards per board: accuracy in %, mean over seeds."""
    lines = []
    for name in ("threshold", *POLICIES):
        columns = zip(*(seed[name] for seed in per_seed), strict=True)
        cells = [
            f"{sum(x for x, _ in column) / len(column):.1f}: {100 * sum(y for _, y in column) / len(column):.1f}"
            for column in columns
        ]
        lines.append(f"{name}: " + ", ".join(cells))
    return lines
