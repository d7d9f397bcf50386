"""The contract of learners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.types import GlobalCounts, LikelihoodEstimate, MaskSample, Rewards, RolloutBatch, WeightsVersion


class Learner(Protocol):
    """Owns the trained weights."""

    step: int

    def score(
        self, batch: RolloutBatch, masks: MaskSample, *, reference: bool = False, draws: bool = False
    ) -> LikelihoodEstimate:
        """Likelihoods without gradient under the current weights, or the frozen reference.

        Args:
            batch: rows.
            masks: draws, for the same rows.
            reference: score the frozen reference instead.
            draws: with the log-probabilities of each draw.
        """

    def update(
        self,
        batch: RolloutBatch,
        rewards: Rewards,
        advantage: Tensor,
        masks: Sequence[MaskSample],
        algorithm: Algorithm,
        *,
        reference: Sequence[LikelihoodEstimate] | None,
        counts: GlobalCounts | None = None,
    ) -> Mapping[str, float]:
        """Train on one batch; the old policy is the one that enters. Returns metrics.

        A non-finite loss or gradient raises before the weights change, and dumps the batch.

        Args:
            batch: rows.
            rewards: of the rows.
            advantage: (N,), (N, L) or (K, N, L).
            masks: draws of each optimiser update; a single entry is shared by all of them.
            algorithm: the method.
            reference: under each entry of masks, or None if the algorithm needs none.
            counts: what a rank that holds some rows of a larger batch is told of it; None = the batch is whole.
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
