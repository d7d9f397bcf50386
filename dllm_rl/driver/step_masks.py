"""The draws of a step: one for all of its optimiser updates, or one for each."""

from __future__ import annotations

from dllm_rl import seeding
from dllm_rl.config.schema import Config
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.types import MaskSample, RolloutBatch


def step_masks(algorithm: Algorithm, batch: RolloutBatch, config: Config, step: int) -> list[MaskSample]:
    """What a learner's update() takes: a pure function of the run seed, the step and the rows."""
    seed, updates = config.run.seed, config.learner.updates_per_step if algorithm.needs.fresh_masks else 1
    first = algorithm.masks(batch, seeding.generator_for(seed, "masks", step))
    later = range(1, updates)
    return [first, *(algorithm.masks(batch, seeding.generator_for(seed, "masks", step, u), u) for u in later)]
