"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from dllm_rl.config.cluster import LearnerSection


def learning_rate(step: int, total_steps: int, config: LearnerSection) -> float:
    """Learning rate of a step: linear warm-up, then constant or cosine down to min_lr_ratio * lr.

    Args:
        step: 0-based optimiser step.
        total_steps: length of the run; the cosine ends one step after the last, so that no step is taken at rate 0.
        config: lr, schedule, warmup_steps, min_lr_ratio.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / (total_steps - config.warmup_steps)
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
