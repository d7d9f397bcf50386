"""What a learner trains: networks that score rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from dllm_rl.types import LikelihoodEstimate, MaskSample, RolloutBatch

Share = Callable[[], Tensor]  # a part of the loss's gradient, as a scalar to differentiate
Named = Iterable[tuple[str, nn.Parameter]]


def join_names(model: Named | None, policy: Named | None) -> list[tuple[str, nn.Parameter]]:
    """Parameters of what is trained, named as learners send them and engines receive them.

    The policy's names begin with "policy." if the model is trained too, so that none occurs twice.
    """
    prefix = "" if model is None else "policy."
    return [*(model or ()), *((prefix + name, parameter) for name, parameter in policy or ())]


class Scorer(Protocol):
    """A trained network whose log-probabilities are computed in micro-batches.

    Attributes:
        trained: its parameters by name.
        ticks: micro-batches so far.
    """

    trained: Sequence[tuple[str, nn.Parameter]]
    ticks: int

    def plan(self, batch: RolloutBatch, masks: MaskSample) -> Sequence[Any]:
        """Micro-batches of everything that there is to score."""

    def add(
        self, estimate: LikelihoodEstimate, batch: RolloutBatch, masks: MaskSample, work: Sequence[Any], *, draws: bool
    ) -> LikelihoodEstimate:
        """An estimate with this network's log-probabilities filled in, with graph if gradients are enabled.

        Args:
            estimate: of the other networks.
            batch: rows.
            masks: draws, for the same rows.
            work: micro-batches.
            draws: fill in the log-probabilities of each draw too.
        """

    def shares(self, batch: RolloutBatch, masks: MaskSample, slope: LikelihoodEstimate) -> Sequence[Share]:
        """Scalars, one per micro-batch and computed when called, whose gradients add up to that of the loss.

        Args:
            batch: rows.
            masks: draws, for the same rows.
            slope: derivatives of the loss, in the place of what it was differentiated in.
        """

    def save(self, folder: Path) -> None:
        """Write the weights into a folder."""

    def load(self, folder: Path) -> None:
        """Restore what save wrote."""
