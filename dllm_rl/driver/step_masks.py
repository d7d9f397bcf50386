"""The draws of a step: one for all of its optimiser updates, or one for each."""

from __future__ import annotations

from collections.abc import Sequence

from dllm_rl import seeding
from dllm_rl.config.schema import Config
from dllm_rl.errors import UserError
from dllm_rl.protocols.algorithm import Algorithm, JointMasks, ReferenceMasks
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


def reference_masks(
    algorithm: Algorithm, batch: RolloutBatch, masks: Sequence[MaskSample], config: Config, step: int
) -> Sequence[MaskSample]:
    """What the reference is scored with for each of step_masks: the same draws, unless the algorithm has others."""
    if not isinstance(algorithm, ReferenceMasks):
        return masks
    generators = [seeding.generator_for(config.run.seed, "reference masks", step, u) for u in range(len(masks))]
    return [algorithm.reference_masks(batch, *pair) for pair in zip(masks, generators, strict=True)]
