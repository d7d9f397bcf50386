"""The draws of a step: one for all of its optimiser updates, or one for each."""

from __future__ import annotations

from dllm_rl import seeding
from dllm_rl.config.schema import Config
from dllm_rl.errors import UserError
from dllm_rl.protocols.algorithm import Algorithm, JointMasks
from dllm_rl.types import MaskSample, RolloutBatch


def step_masks(algorithm: Algorithm, batch: RolloutBatch, config: Config, step: int) -> list[MaskSample]:
    """What a learner's update() takes: a pure function of the run seed, the step and the rows."""
    seed, updates = config.run.seed, config.learner.updates_per_step if algorithm.needs.fresh_masks else 1
    generator = seeding.generator_for(seed, "masks", step)
    if isinstance(algorithm, JointMasks):
        drawn = list(algorithm.joint_masks(batch, generator, updates))
        if len(drawn) != updates:
            raise UserError(
                f"algorithm '{config.algorithm.name}': joint_masks() must return a MaskSample for each of {updates} "
                f"optimiser updates, returned {len(drawn)}"
            )
        return drawn
    first = algorithm.masks(batch, generator)
    later = range(1, updates)
    return [first, *(algorithm.masks(batch, seeding.generator_for(seed, "masks", step, u), u) for u in later)]
