"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from dllm_rl.config.cluster import LearnerSection


def learning_rate(step: int, total_steps: int, config: LearnerSection) -> float:
    """Learning rate of a step: linear warm-up, then constant, or a line or cosine down to min_lr_ratio * lr.

    Args:
        step: 0-based optimiser step.
        total_steps: length of the run; the decay ends one step after the last, so that no step is taken at rate 0.
        config: lr, schedule, warmup_steps, warmup_ratio, min_lr_ratio.
    """
    ratio = config.warmup_ratio
    warmup = config.warmup_steps if ratio is None else math.ceil(ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress, floor = (step - warmup) / (total_steps - warmup), config.min_lr_ratio
    left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (floor + (1 - floor) * left)
