"""The contract of rollout engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dllm_rl.types import (
    Prompt,
    Sampling,
    Trajectory,
    WeightsVersion,
)


class RolloutEngine(Protocol):
    """Generates trajectories with some weights.

    Attributes:
        weights: version of the weights that it holds.
    """

    @property
    def weights(self) -> WeightsVersion:
        """A plain attribute will do; it is set when new weights have arrived."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        samples_per_prompt: int = 1,
        partial: Sequence[Trajectory] | None = None,
        max_blocks: int | None = None,
    ) -> list[Trajectory]:
        """Decode every prompt samples_per_prompt times, prompt-major order.

        A trajectory is a function of (weights, prompt, sample index, sampling, seed) only: not of the batch it is in,
        nor of where it was paused while the weights were the same.

        Args:
            prompts: what to complete.
            sampling: how to decode.
            seed: of all randomness.
            samples_per_prompt: rows of each prompt.
            partial: what an earlier call with the same arguments returned, to go on with where it was paused: blocks
                that are finished stay, whatever the weights now say.
            max_blocks: pause rows once so many decoding blocks of their canvas are finished; None = decode everything.
        """
