"""The contract of learners."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.types import LikelihoodEstimate, MaskSample, RolloutBatch, Sampling, TrainingBatch, WeightsVersion


class Learner(Protocol):
    """Owns the trained weights."""

    step: int

    def score(
        self,
        batch: RolloutBatch,
        masks: MaskSample,
        *,
        reference: bool = False,
        draws: bool = False,
        sampling: Sampling | None = None,
    ) -> LikelihoodEstimate:
        """Likelihoods without gradient under the current weights, or the reference.

        Args:
            batch: rows.
            masks: draws, for the same rows.
            reference: score the reference instead: frozen, or as its last move left it.
            draws: with the log-probabilities of each draw.
            sampling: of the distribution that tokens are drawn from by it, instead of the model's own; the current
                weights' only.
        """

    def update(self, training: TrainingBatch, algorithm: Algorithm) -> Mapping[str, float]:
        """Train on one batch; the old policy is the one that enters. Returns metrics.

        A non-finite loss or gradient raises before the weights change, and dumps the batch.

        Args:
            training: rows and what is known of them.
            algorithm: the method.
        """

    def reference_digest(self) -> str:
        """Digest of the frozen reference's weights."""

    def drop_reference(self) -> None:
        """Free the frozen reference; it is not scored with any more."""

    def skip(self) -> Mapping[str, float]:
        """Count a step without an update: the algorithm kept no row. Returns no metrics."""

    def version(self) -> WeightsVersion:
        """The current step and a digest of the trainable weights."""

    def save(self, folder: Path) -> None:
        """Write model weights (family layout, or adapter) and optimiser state into a folder."""

    def load(self, folder: Path) -> None:
        """Restore what save wrote, bit for bit."""
